"""What a run tells: the summary at start, our values in Megatron's log, and `metrics.jsonl`.

Megatron's loop has no hook for a step's end, so functions of it are wrapped: `training_log`, called
on every rank after each step, and `evaluate`. A test pins their signatures.
"""

import contextlib
import functools
import inspect
import resource
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from megatron.core import mpu
from megatron.core.num_microbatches_calculator import get_current_running_global_batch_size
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
from megatron.core.transformer.module import param_is_not_shared
from megatron.training import get_tensorboard_writer, get_wandb_writer, training
from megatron.training.utils import is_last_rank, print_rank_0

from megatron_let.checkpoint.finite import check_gradients, ranks_with
from megatron_let.checkpoint.retention import Retention
from megatron_let.checkpoint.saves import watched_saves
from megatron_let.methods.base import Method
from megatron_let.training.metrics import MetricsFile
from megatron_let.training.speed import Speed, speed_line
from megatron_let.training.tracking import record_start


class RunLog:
    """Records a run; everything is written by the last rank, as Megatron's own log is."""

    def __init__(self, args: Namespace, method: Method) -> None:
        self.args = args
        self.method = method
        self.file = MetricsFile(None, 0)
        self._num_parameters = 0
        self._known_keys: set[str] = set()
        self._sums: dict[str, torch.Tensor] = {}
        self._num_steps = 0
        self._speed = Speed(self.file.totals, 1)
        self._retention = Retention(args, here=False)
        self._count_bad_losses: Callable[[], int] = int
        self._iteration = 0
        self._evaluated: set[int] = set()

    @contextlib.contextmanager
    def installed(self, model_config: Any, bad_losses: Callable[[], int]) -> Iterator[None]:
        """Wrap Megatron's functions as long as the run lasts; have its model counted.

        `bad_losses` tells how many losses of a step were not finite, on this rank.
        """
        self._count_bad_losses = bad_losses
        model_config.pre_wrap_hooks.append(self._count_model)
        originals = training.training_log, training.evaluate
        training.training_log = self._around_training_log(training.training_log)
        training.evaluate = self._around_evaluate(training.evaluate)
        is_alone = self.args.fake_process_group
        try:
            with contextlib.nullcontext() if is_alone else watched_saves(self.args):
                yield
        except SystemExit:  # Megatron's end before the end: the totals of steps not logged yet
            self.file.write("stop", self._iteration)
            raise
        finally:
            training.training_log, training.evaluate = originals

    def start(self, data: str | None) -> None:
        """Print what the run will do, and write its facts; called once all is built.

        `data` is the hash of the training data and their order.
        """
        args = self.args
        path = Path(args.save) / "metrics.jsonl" if args.save and is_last_rank() else None
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._record_start(path.parent)
        self._iteration = args.iteration
        self._retention = Retention(args, here=torch.distributed.get_rank() == 0)
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

    def finish(self) -> None:
        """Note that the run is complete: an interrupted one has no such line at its end."""
        self.file.write("end", self._iteration)
        self._retention.finish()

    def _count_model(self, chunks: list[torch.nn.Module]) -> list[torch.nn.Module]:
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

    # --- Megatron's functions, wrapped --------------------------------------------------------

    def _around_training_log(self, training_log: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(training_log)

        @functools.wraps(training_log)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            given = signature.bind(*args, **kwargs).arguments
            iteration, is_skipped = given["iteration"], bool(given["skipped_iter"])
            ours = self.method.end_step()
            if not (is_skipped or self.args.fake_process_group):  # a rank alone has random ones
                check_gradients(iteration, given["grad_norm"], ours, self._count_bad_losses)
            if is_last_rank():
                for key in self._known_keys - ours.keys():
                    # else logged as 0.0 for the rest of the run
                    given["total_loss_dict"].pop(key, None)
                self._known_keys = set(ours)
                given["loss_dict"].update(ours)
            self._iteration = iteration
            self._count_step({} if is_skipped else given["loss_dict"])
            if is_skipped:
                self._tell_skipped(iteration)
            result = training_log(*args, **kwargs)
            if iteration % self.args.log_interval == 0:
                self._write_interval(iteration, given["learning_rate"])
                self._retention.apply()
            return result

        return wrapped

    def _count_step(self, loss_dict: dict[str, torch.Tensor]) -> None:
        samples = get_current_running_global_batch_size()
        tokens = samples * self.args.seq_length
        student = training.num_floating_point_operations(self.args, samples)
        before = self.method.flops_once() if self.file.totals["tokens"] == 0 else 0.0
        teacher = self.method.extra_flops(tokens)
        self.file.add_step(tokens, before + student + teacher)
        self._speed.add_step(student, teacher)
        self._num_steps += bool(loss_dict)
        for key, value in loss_dict.items():
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

    def _around_evaluate(self, evaluate: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(evaluate)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            result = evaluate(*args, **kwargs)
            self._write_evaluation(result[0] or {}, _peak_memory())
            self.file.restart_clock()
            return result

        return wrapped

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
