"""What a run tells: the summary at start, our values in Megatron's log, and `metrics.jsonl`."""

import resource
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from megatron.core import mpu
from megatron.core.num_microbatches_calculator import get_current_running_global_batch_size
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
from megatron.core.transformer.module import param_is_not_shared
from megatron.training import get_tensorboard_writer, get_wandb_writer, training
from megatron.training.utils import is_last_rank, print_rank_0

from megatron_let.checkpoint.finite import ranks_with
from megatron_let.methods.base import Method
from megatron_let.training.metrics import MetricsFile
from megatron_let.training.speed import Speed, speed_line
from megatron_let.training.tracking import record_start
from megatron_let.upstream.loop_hooks import Listener, Step


class RunLog(Listener):
    """Records a run; everything is written by the last rank, as Megatron's own log is.

    Args:
        args: the checked command line.
        method: tells what it adds.
        count_bad_losses: tells how many losses of the step are not finite, on this rank; waits.
    """

    def __init__(
        self, args: Namespace, method: Method, count_bad_losses: Callable[[], int]
    ) -> None:
        self.args = args
        self.method = method
        self.file = MetricsFile(None, 0)
        self._num_parameters = 0
        self._sums: dict[str, torch.Tensor] = {}
        self._num_steps = 0
        self._speed = Speed(self.file.totals, 1)
        self._count_bad_losses = count_bad_losses
        self._iteration = 0
        self._evaluated: set[int] = set()

    def on_start(self, data: str | None) -> None:
        """Print what the run will do, and write its facts."""
        args = self.args
        path = Path(args.save) / "metrics.jsonl" if args.save and is_last_rank() else None
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._record_start(path.parent)
        self._iteration = args.iteration
        self.file = MetricsFile(path, args.iteration)
        self._speed = Speed(self.file.totals, torch.distributed.get_world_size())
        facts = self.method.describe()
        self.file.write(
            "start",
            args.iteration,
            name=Path(args.save).name if args.save else args.method,
            method=args.method,
            seed=args.seed,
            train_iters=args.train_iters,
            tokens_per_step=args.global_batch_size * args.seq_length,
            student_parameters=self._num_parameters,
            data=data,
            flops_per_token={
                "student": self._student_flops_per_token(),
                "teacher": (facts["teacher"] or {}).get("flops_per_token", 0.0),
            },
            **facts,
        )
        print_rank_0(self._summary(facts))

    def _record_start(self, save: Path) -> None:
        try:
            record_start(save, self.args)
        except OSError as error:  # it is no reason not to train
            print(f"> this start is not recorded: {error}", flush=True)

    def on_end(self, is_complete: bool) -> None:
        """Note how it ended: a run that was killed has no such line at its end."""
        # A stop before the end: the totals of steps that are not logged yet.
        self.file.write("end" if is_complete else "stop", self._iteration)

    def count_model(self, chunks: list[torch.nn.Module]) -> list[torch.nn.Module]:
        """Count the student's parameters: a hook for Megatron's `pre_wrap_hooks`."""
        self._num_parameters = count_parameters(chunks)
        return chunks

    def _student_flops_per_token(self) -> float:
        return training.num_floating_point_operations(self.args, 1) / self.args.seq_length

    def _summary(self, facts: dict[str, Any]) -> str:
        args = self.args
        rows = [
            f"student: {self._num_parameters / 1e6:.2f} M parameters, {args.num_layers} layers of "
            f"width {args.hidden_size}, TP {args.tensor_model_parallel_size} x PP "
            f"{args.pipeline_model_parallel_size} x DP {args.data_parallel_size}",
            *self.method.summary(),
        ]
        if facts["teacher"]:
            share = self.method.extra_flops(1) / self._student_flops_per_token()
            rows.append(f"expected extra FLOPs in a guided step: {100 * share:.1f} %")
            stages, busy = args.pipeline_model_parallel_size, len(facts["teacher"]["stages"])
            if stages > 1:
                rows[-1] += (
                    f"; they fall on {busy} of {stages} stages, where they are "
                    f"{100 * share * stages / busy:.1f} % of a stage's work (tools/plan.py "
                    "balances the stages)"
                )
        return "\n".join(f"> {row}" for row in [f"--method {args.method}", *rows])

    # --- during the run -----------------------------------------------------------------------

    def after_step(self, step: Step) -> None:
        """Count it."""
        self._iteration = step.number
        losses = step.losses | (step.reported if is_last_rank() else {})
        self._count_step({} if step.is_skipped else losses)
        if step.is_skipped:
            self._tell_skipped(step.number)

    def _count_step(self, losses: dict[str, torch.Tensor]) -> None:
        samples = get_current_running_global_batch_size()
        tokens = samples * self.args.seq_length
        student = training.num_floating_point_operations(self.args, samples)
        before = self.method.flops_once() if self.file.totals["tokens"] == 0 else 0.0
        teacher = self.method.extra_flops(tokens)
        self.file.add_step(tokens, before + student + teacher)
        self._speed.add_step(student, teacher)
        self._num_steps += bool(losses)
        for key, value in losses.items():
            self._sums[key] = self._sums.get(key, 0.0) + value.detach().float().sum()

    def _tell_skipped(self, iteration: int) -> None:
        """Say which ranks' losses made Megatron skip a step's update; called on every rank."""
        ranks = ranks_with(self._count_bad_losses())
        what = "a gradient is not finite, the language-model loss is on every rank"
        if ranks:
            what = f"the loss is not finite on rank {', '.join(map(str, ranks))}"
        if is_last_rank():
            print(f"> step {iteration}: no update, {what}", flush=True)
        self.file.write("skip", iteration, ranks=ranks)

    def after_log(self, step: Step) -> None:
        """Write what an interval was like at its end."""
        if step.number % self.args.log_interval == 0:
            self._write_interval(step.number, step.learning_rate)

    def _write_interval(self, iteration: int, learning_rate: float | None) -> None:
        means = {key: value.item() / max(self._num_steps, 1) for key, value in self._sums.items()}
        speed = self._speed.end_interval(self.file.totals, self.args.train_iters - iteration)
        self.file.write("train", iteration, **means, **speed, **{"learning-rate": learning_rate})
        if is_last_rank():
            self._tell_speed(iteration, speed)
        self._sums, self._num_steps = {}, 0

    def _tell_speed(self, iteration: int, speed: dict[str, float]) -> None:
        print(speed_line(speed), flush=True)
        for key, value in speed.items():
            if writer := get_tensorboard_writer():
                writer.add_scalar(key, value, iteration)
        if wandb := get_wandb_writer():
            wandb.log(speed, iteration)

    def after_evaluation(self, losses: dict[str, torch.Tensor]) -> None:
        """Write the validation loss."""
        self._write_evaluation(losses, _peak_memory())
        self.file.restart_clock()

    def _write_evaluation(self, losses: dict[str, torch.Tensor], peak_memory: float) -> None:
        # After training Megatron evaluates the validation set once more, then the test set, at
        # the same iteration: the first evaluation of an iteration is the one that counts.
        if losses and self._iteration not in self._evaluated:
            self._evaluated.add(self._iteration)
            values = {key: value.item() for key, value in losses.items()}
            values["peak memory"] = peak_memory
            self.file.write("valid", self._iteration, **values)


def _peak_memory() -> float:
    """Bytes that the fullest rank has had: of the GPU's, without one of the process's."""
    own = float(torch.cuda.max_memory_allocated())
    own = own or 1024.0 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    peak = torch.tensor(own, dtype=torch.float64, device=torch.cuda.current_device())
    torch.distributed.all_reduce(peak, op=torch.distributed.ReduceOp.MAX)
    return peak.item()


def count_parameters(chunks: list[torch.nn.Module]) -> int:
    """Parameters of the whole student, each once, from this rank's chunks; called on every rank.

    A learned map of LET is none of them: it is trained with the student, but never exported.
    """
    dense_and_expert = torch.zeros(2, dtype=torch.int64, device=torch.cuda.current_device())
    for chunk in chunks:
        for name, weight in chunk.named_parameters():
            if (
                ".let_resize." not in name
                and param_is_not_shared(weight)
                and param_is_not_tensor_parallel_duplicate(weight)
            ):
                is_expert = not getattr(weight, "allreduce", True)  # Megatron's own mark
                dense_and_expert[int(is_expert)] += weight.numel()
    torch.distributed.all_reduce(dense_and_expert)
    dense, expert = dense_and_expert.tolist()
    replicas = mpu.get_data_parallel_world_size(with_context_parallel=True)
    return dense // replicas + expert // mpu.get_expert_data_parallel_world_size()
