"""What a run tells: the summary at start, our values in Megatron's log, and `metrics.jsonl`."""

import resource
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from megatron.core import mpu
from megatron.core.num_microbatches_calculator import get_current_running_global_batch_size
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
from megatron.core.transformer.module import param_is_not_shared
from megatron.training import get_tensorboard_writer, get_wandb_writer, training
from megatron.training.utils import is_last_rank

from megatron_let.checkpoint.finite import ranks_with
from megatron_let.console import keep, say
from megatron_let.methods.base import Method
from megatron_let.training.metrics import MetricsFile, Totals
from megatron_let.training.tracking import record_start
from megatron_let.upstream import cpu
from megatron_let.upstream.loop_hooks import Listener, Save, Step

TOKENS, TFLOPS = "tokens per second", "TFLOP/s per GPU"
WEIGHT = " weight"
TEACHER_SHARE, SECONDS_LEFT = "teacher share", "seconds left"


class RunLog(Listener):
    """Records a run; everything is written by the last rank, as Megatron's own log is.

    `count_bad_losses` tells how many losses of the step are not finite, on this rank; it waits.
    """

    def __init__(
        self, args: Namespace, method: Method, count_bad_losses: Callable[[], int]
    ) -> None:
        self.args = args
        self.method = method
        self.file = MetricsFile(None, 0)
        self._num_parameters = 0
        self._interval = Interval(self.file.totals)
        self._count_bad_losses = count_bad_losses
        self._iteration = 0
        self._evaluated: dict[int, list[dict[str, float]]] = {}
        self._data: str | None = None
        """The hash of the data and their order."""

    def state(self) -> dict[str, Any]:
        """That."""
        return {"data": self._data}

    def on_load(self, state: dict[str, Any]) -> None:
        """That of the checkpoint's run."""
        self._data = state["data"]

    def on_start(self, data: str | None) -> None:
        """Print what the run will do, and write its facts."""
        args = self.args
        # An evaluation by itself is no part of the training there, maybe of its middle.
        name = "evaluated.jsonl" if args.skip_train else "metrics.jsonl"
        path = Path(args.save) / name if args.save and is_last_rank() else None
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                record_start(path.parent, args)
                if args.iteration and not args.skip_train:
                    take_over(Path(args.load) / path.name, path)
            except OSError as error:  # it is no reason not to train
                say(f"> not all of this start is recorded: {error}")
        self._iteration = args.iteration
        self.file = MetricsFile(path, args.iteration)
        self._interval = Interval(dict(self.file.totals))
        facts = self.method.describe()
        student = training.num_floating_point_operations(args, 1) / args.seq_length
        teacher = (facts["teacher"] or {}).get("flops_per_token", 0.0)
        self.file.write(
            "start",
            args.iteration,
            name=Path(args.save).name if args.save else args.method,
            method=args.method,
            seed=args.seed,
            train_iters=args.train_iters,
            tokens_per_step=tokens_per_step(args),
            student_parameters=self._num_parameters,
            data=data,
            init_from=args.init_from,
            flops_per_token={"student": student, "teacher": teacher},
            **facts,
        )
        keep(args.save and Path(args.save))
        if torch.distributed.get_rank() == 0:
            say(self._summary(facts["teacher"], student))
            if args.iteration and self._data not in (None, data):
                say(
                    "> the samples from here on may be others than the checkpoint's run would "
                    "have seen, or in another order: the data or its folder, --split, --seed, "
                    "--seq-length, the batches or the run's length have changed"
                )
        self._data = data

    def on_end(self, is_complete: bool) -> None:
        """Note how it ended: a run that was killed has no such line at its end."""
        if is_complete and not self.args.skip_train:  # its last steps may have been left out
            self._iteration = max(self._iteration, self.args.train_iters)
        if self._speaks():
            say(f"> {'complete' if is_complete else 'stopped'} at step {self._iteration}")
        # A stop before the end: the totals of steps that are not logged yet.
        self.file.write("end" if is_complete else "stop", self._iteration)

    def count_model(self, chunks: list[torch.nn.Module]) -> list[torch.nn.Module]:
        """Count the student's parameters: a hook for Megatron's `pre_wrap_hooks`."""
        self._num_parameters = count_parameters(chunks)
        return chunks

    def _summary(self, teacher: dict[str, Any] | None, student_flops_per_token: float) -> str:
        args = self.args
        rows = [
            f"student: {self._num_parameters / 1e6:.2f} M parameters, {args.num_layers} layers of "
            f"width {args.hidden_size}, TP {args.tensor_model_parallel_size} x PP "
            f"{args.pipeline_model_parallel_size} x DP {args.data_parallel_size}",
            *self.method.summary(),
        ]
        if left_out := sorted(n for n in args.iterations_to_skip if n > args.iteration):
            rows.append(f"--iterations-to-skip leaves out {', '.join(map(str, left_out))}")
        if teacher:
            share = self.method.extra_flops(1) / student_flops_per_token
            rows.append(f"expected extra FLOPs in a guided step: {100 * share:.1f} %")
            stages, busy = args.pipeline_model_parallel_size, len(teacher["stages"])
            if stages > 1:
                rows[-1] += (
                    f"; they fall on {busy} of {stages} stages, where they are "
                    f"{100 * share * stages / busy:.1f} % of a stage's work (megatron-let plan "
                    "balances the stages)"
                )
        return "\n".join(f"> {row}" for row in [f"--method {args.method}", *rows])

    # --- during the run -----------------------------------------------------------------------

    def after_step(self, step: Step) -> None:
        """Count it."""
        self._iteration = step.number
        samples = get_current_running_global_batch_size()
        tokens = samples * self.args.seq_length
        student = training.num_floating_point_operations(self.args, samples)
        before = self.method.flops_once() if self.file.totals["tokens"] == 0 else 0.0
        teacher = self.method.extra_flops(tokens)
        self.file.add_step(tokens, before + student + teacher)
        losses = step.losses | (step.reported if is_last_rank() else {})
        self._interval.add_step(student, teacher, {} if step.is_skipped else losses)
        if step.is_skipped:
            self._tell_skipped(step.number)

    def _tell_skipped(self, iteration: int) -> None:
        """Say which ranks' losses made Megatron skip a step's update; called on every rank."""
        ranks = ranks_with(self._count_bad_losses())
        what = "a gradient is not finite, the language-model loss is on every rank"
        if ranks:
            what = f"the loss is not finite on rank {', '.join(map(str, ranks))}"
        if is_last_rank():
            say(f"> step {iteration}: no update, {what}")
        self.file.write("skip", iteration, ranks=ranks)

    def after_log(self, step: Step) -> None:
        """Write what an interval was like at its end."""
        if step.number % self.args.log_interval:
            return
        means, totals = self._interval.means(), self.file.totals
        speed = self._interval.speed(
            totals, torch.distributed.get_world_size(), self.args.train_iters - step.number
        )
        rate = {"learning-rate": step.learning_rate}
        self.file.write("train", step.number, **means, **speed, **rate)
        if self._speaks():
            say(step_line(step.number, self.args.train_iters, means, speed))
        if writer := get_tensorboard_writer():  # on the last rank alone, as W&B's
            for key, value in speed.items():
                writer.add_scalar(key, value, step.number)
        if wandb := get_wandb_writer():
            wandb.log(speed, step.number)
        self._interval = Interval(dict(totals))

    def before_save(self, save: Save) -> None:
        """Note the totals between two intervals: a run that is killed goes on with them."""
        if save.step % self.args.log_interval:
            self.file.write("save", save.step)

    def after_save(self, folder: Path) -> None:
        """Say it."""
        if torch.distributed.get_rank() == 0:
            say(f"> saved {folder}")

    def after_evaluation(self, losses: dict[str, torch.Tensor]) -> None:
        """Write the validation loss; of several sets each one's, and their mean as `valid`."""
        peak_memory, sets = _peak_memory(), self._validation_sets()
        seen = self._evaluated.setdefault(self._iteration, [])
        # After training Megatron evaluates all once more, then the test sets, at the same
        # iteration: its first evaluations are those that count, of an earlier start, too.
        is_new = self._iteration > self.args.iteration or not self.file.is_evaluated
        if losses and len(seen) < len(sets) and (is_new or self.args.skip_train):
            seen.append({key: value.item() for key, value in losses.items()})
            if len(sets) > 1:
                self.file.write("valid set", self._iteration, set=sets[len(seen) - 1], **seen[-1])
            if len(seen) == len(sets):
                means = {key: fmean(values[key] for values in seen) for key in losses}
                self.file.write("valid", self._iteration, **means, **{"peak memory": peak_memory})
                if self._speaks():
                    say(evaluation_line(self._iteration, means, dict(zip(sets, seen, strict=True))))
        self.file.restart_clock()

    def _speaks(self) -> bool:
        """Whether this rank tells how the run gets on; one that is alone does."""
        return is_last_rank() or self.args.fake_process_group

    def _validation_sets(self) -> list[str]:
        if not self.args.multiple_validation_sets:
            return ["all"]
        return self.args.validation_set_names or [str(i) for i in range(len(self.args.eval_iters))]


# --- an interval of the log ---------------------------------------------------------------------


@dataclass
class Interval:
    """What the steps since `start` were like; evaluations are left out, as in `MetricsFile`."""

    start: Totals
    student_flops: float = 0.0
    teacher_flops: float = 0.0
    """In steps: what was computed before the run (scoring) is in no interval."""
    num_steps: int = 0
    losses: dict[str, list[torch.Tensor]] = field(default_factory=dict)
    """Of the updates that had them: guidance may end, or begin, within the interval."""

    def add_step(
        self, student_flops: float, teacher_flops: float, losses: dict[str, torch.Tensor]
    ) -> None:
        """Count a step; one without losses made no update."""
        self.student_flops += student_flops
        self.teacher_flops += teacher_flops
        self.num_steps += 1
        for key, value in losses.items():
            self.losses.setdefault(key, []).append(value.detach().float().sum())

    def means(self) -> dict[str, float]:
        """The mean losses; this waits for the device."""
        return {key: float(sum(values)) / len(values) for key, values in self.losses.items()}

    def speed(self, totals: Totals, num_ranks: int, steps_left: int) -> dict[str, float]:
        """Return tokens, FLOPs and the time that is left, at the rate up to `totals`.

        The FLOPs are those of one of `num_ranks` GPUs, or on a CPU processes.
        """
        seconds = max(totals["seconds"] - self.start["seconds"], 1e-9)
        flops = self.student_flops + self.teacher_flops
        tflops = TFLOPS.replace("GPU", "process") if cpu.is_active() else TFLOPS
        return {
            TOKENS: (totals["tokens"] - self.start["tokens"]) / seconds,
            tflops: flops / seconds / num_ranks / 1e12,
            TEACHER_SHARE: self.teacher_flops / flops if flops else 0.0,
            SECONDS_LEFT: steps_left * seconds / max(self.num_steps, 1),
        }


def step_line(
    step: int, steps: int | None, means: dict[str, float], speed: dict[str, float]
) -> str:
    """Return the console's line on an interval, of at most 100 columns."""
    parts = [f"> step {step}" + (f"/{steps}" if steps else "")]
    parts += [f"loss {means['lm loss']:.4f}"] if "lm loss" in means else []
    for name in (key.removesuffix(WEIGHT) for key in means if key.endswith(WEIGHT)):
        if f"{name} loss" in means:
            parts.append(f"{name} {means[f'{name} loss']:.3f} x {means[name + WEIGHT]:.2g}")
    tokens = speed[TOKENS]
    parts.append(f"{tokens:,.0f} tok/s" if tokens < 1e5 else f"{tokens / 1e3:,.0f}k tok/s")
    hours, minutes = divmod(round(speed[SECONDS_LEFT] / 60), 60)
    parts.append(f"{hours}:{minutes:02d} left")
    return " | ".join(parts)


def evaluation_line(step: int, means: dict[str, float], sets: dict[str, dict[str, float]]) -> str:
    """Return the console's line on an evaluation: the loss, and of several sets each one's."""
    line = f"> step {step}: validation loss {means['lm loss']:.4f}"
    each = ", ".join(f"{name} {losses['lm loss']:.4f}" for name, losses in sets.items())
    return f"{line} ({each})" if len(sets) > 1 else line


def _peak_memory() -> float:
    """Bytes that the fullest rank has had: of the GPU's, without one of the process's."""
    own = float(torch.cuda.max_memory_allocated())
    own = own or 1024.0 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    peak = torch.tensor(own, dtype=torch.float64, device=torch.cuda.current_device())
    torch.distributed.all_reduce(peak, op=torch.distributed.ReduceOp.MAX)
    return peak.item()


def take_over(earlier: Path, path: Path) -> None:
    """Go on with the records of the checkpoint's run, where it was saved in another folder.

    They begin with a start, which makes void what a run without that checkpoint has left in `path`.
    """
    known = path.read_bytes() if path.exists() else b""
    if not earlier.is_file():
        say(f"> no {earlier}: tokens, FLOPs and seconds are counted from this step on")
    elif (records := earlier.read_bytes()) not in known:
        with path.open("ab") as file:
            file.truncate(known.rfind(b"\n") + 1)  # without what a kill has torn
            file.write(records)


def tokens_per_step(args: Namespace) -> int | None:
    """Where batches grow the mean over the run, None if that makes no step."""
    if args.step_batch_size_schedule is None:
        return args.global_batch_size * args.seq_length
    return args.train_iters and args.train_samples * args.seq_length // args.train_iters


def count_parameters(chunks: list[torch.nn.Module]) -> int:
    """Parameters of the whole student, each once, from this rank's chunks; called on every rank.

    A learned map of LET is none of them: it is trained with the student, but never exported.
    """
    dense_and_expert = torch.zeros(2, dtype=torch.int64, device=torch.cuda.current_device())
    for name, weight in (named for chunk in chunks for named in chunk.named_parameters()):
        is_first = param_is_not_shared(weight) and param_is_not_tensor_parallel_duplicate(weight)
        if is_first and ".let_resize." not in name:
            is_expert = not getattr(weight, "allreduce", True)  # Megatron's own mark
            dense_and_expert[int(is_expert)] += weight.numel()
    torch.distributed.all_reduce(dense_and_expert)
    dense, expert = dense_and_expert.tolist()
    replicas = mpu.get_data_parallel_world_size(with_context_parallel=True)
    return dense // replicas + expert // mpu.get_expert_data_parallel_world_size()
