"""Methods with a teacher: `TeacherMethod` runs it for its signals."""

from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from megatron.core import mpu
from megatron.core.num_microbatches_calculator import get_num_microbatches
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_let.console import say
from megatron_let.errors import UsageError
from megatron_let.methods.auto import choices
from megatron_let.methods.base import Method
from megatron_let.methods.ending import MARGIN, NAMES, PATIENCE, RAMP, Ending, check_ending
from megatron_let.methods.signal import Signal
from megatron_let.methods.table import Flags
from megatron_let.teacher.host import TeacherHost
from megatron_let.teacher.load import TeacherConfig, read_teacher_config
from megatron_let.teacher.work import micro_batches_at_once
from megatron_let.upstream.batch import Batch
from megatron_let.upstream.loop_hooks import Listener, Step


@dataclass(frozen=True)
class TeacherFlags(Flags):
    """The small frozen model that guides the student; never trained, never in a checkpoint."""

    title = "teacher"

    teacher_model: str | None = None
    """Folder or hub id of a Hugging Face causal language model. --method let takes one with
    another tokenizer than the student's, too; the others need the student's."""

    teacher_revision: str | None = None
    """Branch, tag or commit of a hub id; the default is its main branch."""

    teacher_seq_length: int | None = None
    """Of a teacher with another tokenizer: tokens that a row may take, what goes beyond is not
    guided. The default is 1.1 times the longest of the run's first 64 rows."""

    teacher_dtype: Literal["fp32", "bf16", "fp16"] | None = None
    """Precision of the teacher's forward pass; the default is the student's."""

    teacher_control: Literal["none", "random", "shuffled", "zero"] = "none"
    """An experiment's control. random: an untrained teacher of the same shape; shuffled: its states
    of other positions; zero: it works, and nothing of it reaches the student."""

    guidance: Literal["flags", "auto"] = "flags"
    """auto: weight, course and end set themselves, as the first lines of the run say; flags beside
    it count."""

    guidance_stop: Literal["step", "loss", "cosine"] = "step"
    """step: the guidance ends at its stop step, the latest for the others. loss: once the student's
    loss is down to the teacher's on the same tokens, with LET alone those of every tenth step, with
    let+salt until --kd-stop-step. cosine (LET): once the two gradients at the aligned layer point
    apart."""

    guidance_margin: float = MARGIN
    """What the moving average must come down to: of the student's less the teacher's loss in nats,
    or of the cosine."""

    guidance_patience: int = PATIENCE
    """For so many steps one after the other."""

    guidance_ramp: int = RAMP
    """Steps in which all weights then fall linearly to zero."""


class TeacherMethod(Method):
    """A frozen teacher runs on the chunks of the pipeline that its signals need, while they last.

    Args:
        args: the checked command line.
        signals: the classes of the ways in which the teacher guides.
    """

    flag_group = TeacherFlags

    def __init__(self, args: Namespace, signals: Sequence[type[Signal]]) -> None:
        super().__init__(args)
        args.teacher_fingerprint = args.teacher_row_tokens = None  # saved in checkpoints
        config = _read_config(args)
        self.signals = [signal(args, config) for signal in signals]
        layer, *others = {signal.teacher_layer() for signal in self.signals}
        if others:
            raise UsageError(
                "Distillation needs the teacher's last layer, so --method let+salt aligns with it "
                "too: remove --let-teacher-layer."
            )
        self.host = TeacherHost(args, config, layer)
        check_ending(args, {signal.measure for signal in self.signals})
        self._ending = Ending(args)
        self._student_loss: torch.Tensor | None = None
        """Of the last step, on the ranks that know it."""
        self._transformer: TransformerConfig

    @classmethod
    def check_flags(cls, args: Namespace) -> None:
        """There must be a teacher."""
        if args.teacher_model is None:
            raise UsageError(
                f"--method {args.method} needs a teacher. Add --teacher-model with the folder or "
                "hub id of a small causal language model."
            )

    @property
    def same_on_resume(self) -> tuple[str, ...]:
        """The teacher itself is known by its weights (`teacher_fingerprint`), wherever it lies."""
        own = ("teacher_control", *NAMES)
        return sum((signal.same_on_resume for signal in self.signals), own)

    @property
    def translates(self) -> bool:  # type: ignore[override]
        """Whether the teacher has another tokenizer."""
        return self.host.translation is not None

    @property
    def _guiding(self) -> list[Signal]:
        """Those that guide in the current step."""
        return [signal for signal in self.signals if signal.weight > 0]

    # --- before the run -----------------------------------------------------------------------

    def check_tokens(self, student_ids: dict[str, int]) -> None:
        """The teacher must have the student's tokenizer, or rows of its own."""
        self.host.check_tokens(student_ids, any(s.needs_same_tokens for s in self.signals))
        if self.translates and self.args.guidance_stop == "loss":
            raise UsageError(
                "--guidance-stop loss compares losses on the same tokens, and the teacher has "
                "another tokenizer than the student's. Use --guidance-stop step or cosine."
            )
        for signal in self.signals:
            signal.is_translated = self.translates

    def check_checkpoint(self, saved: Namespace) -> None:
        """Remember whose guidance the checkpoint has; `on_data` compares."""
        for signal in self.signals:
            signal.check_checkpoint(saved)
        if not self.args.finetune and vars(saved).get("method") == self.args.method:
            self.args.teacher_fingerprint = vars(saved).get("teacher_fingerprint")
            self._take_row_length(vars(saved).get("teacher_row_tokens"))

    def _take_row_length(self, saved: int | None) -> None:
        given = self.args.teacher_seq_length
        if saved is not None and given not in (None, saved):
            raise UsageError(
                f"--teacher-seq-length {given}: the checkpoint in {self.args.load} was guided by "
                f"rows of {saved}. Leave it out, or start a new run from the weights: --finetune, "
                "with another --save."
            )
        self.args.teacher_row_tokens = saved

    def configure(self, model_config: Any) -> None:
        """Remember Megatron's `TransformerConfig`, and let the signals change theirs."""
        self._transformer = model_config.transformer
        for signal in self.signals:
            signal.configure(model_config)

    def reads_batch(self, vp_stage: int | None) -> bool:
        """The chunks that need the teacher."""
        return any(vp_stage in signal.owner_chunks for signal in self.signals)

    def training_data(self, dataset: Any) -> Any:
        """The stream that the signals make of it."""
        for signal in self.signals:
            dataset = signal.training_data(dataset)
        return dataset

    def chunk_data(self, dataset: Any) -> Any:
        """With rows for a teacher that has another tokenizer, while it guides."""
        self._set_weights(self.args.iteration)
        return self.host.translated(dataset) if self._guiding else dataset

    def further_keys(self) -> Mapping[str, int]:
        """Those rows, and the index into them."""
        return self.host.further_keys() if self._guiding else {}

    def listeners(self) -> list[Listener]:
        """The signals may keep a state."""
        return [self, *self.signals]

    def on_data(self, train_dataset: Any) -> None:
        """Load the teacher on its stages and score it on the run's first micro-batch."""
        for signal in self.signals:  # by now the steps are known of a run with growing batches
            signal.check_flags(self.args)
        self._set_weights(self.args.iteration)
        self.host.agree(bool(self._guiding))
        if any(signal.owner_chunks for signal in self._guiding):
            self.load()
            self.host.score(train_dataset)
            self.prepare_teacher()
        stage = mpu.get_pipeline_model_parallel_rank()
        self.host.share([[(stage, vp) for vp in signal.owner_chunks] for signal in self.signals])
        if self.host.facts:
            self._check_fingerprint()

    def _set_weights(self, step: int) -> None:
        for signal in self.signals:
            signal.weight = signal.weight_at(step) * self._ending.factor(step)

    def _check_fingerprint(self) -> None:
        before, now = self.args.teacher_fingerprint, self.host.facts["fingerprint"]
        if before not in (None, now):
            raise UsageError(
                f"The teacher's weights (in its --teacher-dtype, with its tokenizer where that is "
                f"another than the student's) have the fingerprint {now}, but {before} guided the "
                f"run that saved the checkpoint in {self.args.load}. Resume with that teacher, or "
                "start a new run from the checkpoint's weights: --finetune, with another --save."
            )
        self.args.teacher_fingerprint = now

    def load(self) -> None:
        """Load the teacher on this rank."""
        self.host.load(self._transformer.params_dtype)

    def prepare_teacher(self) -> None:
        """Let the signals take what they need of a whole teacher; drop the rest."""
        assert self.host.teacher is not None
        for signal in self.signals:
            if signal.owner_chunks:
                signal.prepare(self.host.teacher)
        self.host.teacher.keep_states_only()

    # --- during the run -----------------------------------------------------------------------

    def start_step(self) -> None:
        """Fix the step's weights before Megatron moves its counters on."""
        self._set_weights(self.args.curr_iteration)
        for signal in self.signals:
            signal.start_step()

    def micro_batches_at_once(self) -> int:
        """So many that their rows can be dealt evenly over the ranks that share them."""
        if not self._guiding:
            return 1
        ranks = mpu.get_tensor_and_context_parallel_world_size()
        return micro_batches_at_once(self.args.micro_batch_size, ranks)

    def before_forward(self, batches: list[Batch], vp_stage: int | None) -> None:
        """Run the teacher once for all signals of the chunk, and hand its states to each."""
        guided = [signal for signal in self._guiding if vp_stage in signal.owner_chunks]
        if not guided:
            return
        sliced = all(signal.slices_sequence() for signal in guided)
        states = self.host.states(batches, sliced=sliced)
        for signal in guided:
            signal.push(batches, states)

    def language_model_losses(self) -> torch.Tensor | None:
        """From the signal that has replaced the model's loss, if one has."""
        every = (signal.language_model_losses() for signal in self.signals)
        return next((losses_BS for losses_BS in every if losses_BS is not None), None)

    def after_step(self, step: Step) -> None:
        """Report the step, and remember its loss."""
        self._student_loss = step.losses.get("lm loss")
        super().after_step(step)

    def end_step(self, is_skipped: bool = False) -> dict[str, torch.Tensor]:
        """Sum the step's records over all ranks; release the teacher after its last use."""
        guided = self._guiding
        works = any(signal.owner_chunks for signal in guided)
        if not works and self.host.teacher is not None:
            for signal in self.signals:
                signal.release()
            self.host.release()
        if not guided:
            return {}
        zero, values = torch.zeros((), device=torch.cuda.current_device()), []
        for signal in guided:
            self.check_every_micro_batch(signal)
            found = signal.queue.sums
            values += [found.get(name, zero).float() for name in signal.recorded]
        student = zero if self._student_loss is None else self._student_loss.float().view(())
        values += [student, zero + float(self._student_loss is not None)]
        sums = torch.stack([*values, zero + self.host.clock.read(), zero + float(works)])
        torch.distributed.all_reduce(sums)
        *totals, student, knowing, milliseconds, workers = sums.split(1)
        report: dict[str, torch.Tensor] = {}
        for signal in guided:
            number = len(signal.recorded)
            report |= signal.report(*totals[:number])
            if not is_skipped:
                signal.learn(*totals[:number])
                self._judge(signal, student / knowing, totals[:number])
            totals = totals[number:]
        return report | {"teacher time (ms)": milliseconds / workers}

    def _judge(self, signal: Signal, loss: torch.Tensor, totals: Sequence[torch.Tensor]) -> None:
        if signal.measure == self.args.guidance_stop:
            step, value = self.args.curr_iteration + 1, signal.measured(loss, *totals)
            why = self._ending.learn(step, value, signal.measured_every)
            if why is not None and torch.distributed.get_rank() == 0:
                say(f"> the guidance ends within {self.args.guidance_ramp} steps: {why}")

    def on_load(self, state: dict[str, Any]) -> None:
        """Where a guidance that ends itself was."""
        self._ending.load(state)

    def state(self) -> dict[str, Any]:
        """That."""
        return self._ending.state()

    def check_every_micro_batch(self, signal: Signal) -> None:
        """Stop the run if the teacher did not take part as it must.

        Raises:
            RuntimeError: its losses in this step are not one for each micro-batch.
        """
        expected = get_num_microbatches() if signal.owner_chunks else 0
        used = signal.queue.micro_batches
        if used != expected:
            raise RuntimeError(
                f"Step {self.args.curr_iteration + 1}: --method {self.args.method} recorded "
                f"{used} losses with the teacher for {expected} micro-batches. Some "
                "path of Megatron bypassed it; please report the flags of this run."
            )

    # --- what it costs and what it does -------------------------------------------------------

    def extra_flops(self, tokens: int) -> float:
        """The teacher's forward passes in a guided step, one on each chunk that needs them."""
        facts, guided = self.host.facts, self._guiding
        if not guided or not facts:
            return 0.0
        places = zip(self.signals, facts["chunks"], strict=True)
        chunks = {place for signal, every in places if signal in guided for place in every}
        own = sum(signal.flops_per_token() for signal in guided)
        return tokens * (len(chunks) * facts["flops_per_token"] + own)

    def flops_once(self) -> float:
        """What was spent before the first step."""
        return sum(signal.flops_once() for signal in self.signals)

    def describe(self) -> dict[str, Any]:
        """The teacher, for the run's `metrics.jsonl`."""
        return {"teacher": self.host.facts or None}

    def summary(self) -> list[str]:
        """The signals and the teacher."""
        lines = [*(signal.summary() for signal in self.signals), *self.host.summary()]
        return [f"--guidance auto: {choices(self.args)}"] * (self.args.guidance == "auto") + lines


def _read_config(args: Namespace) -> TeacherConfig:
    try:
        return read_teacher_config(args.teacher_model, args.teacher_revision)
    except UsageError as error:
        if args.load is None:
            raise
        raise UsageError(
            f"{error} A run whose guidance is over goes on without a teacher: --method baseline."
        ) from error
