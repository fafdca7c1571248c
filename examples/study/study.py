"""One study on one machine: what is done, what can be done next, and how a run is made."""

import json
import math
import re
import shutil
import threading
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from examples.study.record import Summary, machine, read_summary, score_model, write_summary
from examples.study.table import PLAIN, Planned, Regime, Setting, Table
from megatron_let.commands import convert_checkpoint
from megatron_let.files import sha256
from megatron_let.quickstart.corpus import Deduplicator, default_roots, find_sources, write_split
from megatron_let.quickstart.run import Model, Quickstart, is_finished
from megatron_let.quickstart.wheels import fetch_wheels
from megatron_let.report.runs import Evaluation, Run, read_run
from megatron_let.report.targets import Cost, cost_to_target, loss_at

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTATION = Path(__file__).with_name("documentation.txt")


class Study:
    """The runs of a table.

    Args:
        table: what is declared.
        folder: data and checkpoints.
        record: the committed results: `runs/NAME.jsonl`, `teachers/REGIME/`.
        on_gpu: runs take the first GPU, not the CPU.
    """

    def __init__(self, table: Table, folder: Path, record: Path, on_gpu: bool = False) -> None:
        self.table = table
        self.folder = folder
        self.record = record
        self.teachers = {f"teacher-{size}": m for size, m in table.recipe.teachers.items()}
        regime = next(iter(table.recipe.teachers))
        self.quickstart = Quickstart(table.recipe, folder, regime, 1, on_gpu)
        self._machine = machine(on_gpu)  # now: a conversion below takes the CPU for the GPU
        self._one_at_a_time = threading.Lock()
        """Held while something is built that two runs may share."""

    # --- data -----------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Have text, tokenizer and datasets at hand, and check that they are the declared ones."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.quickstart.data()
        path = self.texts["documentation"]
        if not path.exists():
            roots, ending = default_roots(), ".pyi"
            if self.table.recipe.from_wheels:
                roots, ending = tuple(fetch_wheels(DOCUMENTATION)), "README.md"
            sources = find_sources(roots, ending)
            write_split(path, sources, self.table.documentation_bytes, Deduplicator(), 1.0)
        for name, expected in self.table.hashes.items():
            found = sha256(self.folder / name)
            if found != expected:
                raise ValueError(
                    f"{self.folder / name} has the hash {found[:12]} instead of {expected[:12]}: "
                    "its runs would not compare with the record. Remove the folder, and run again"
                )

    @property
    def texts(self) -> dict[str, Path]:
        """The texts that finished models are scored on."""
        return {t: self.folder / "corpus" / f"{t}.jsonl" for t in ("valid", "documentation")}

    # --- what is known --------------------------------------------------------------------------

    @property
    def names(self) -> tuple[str, ...]:
        """All runs in their order; the teachers' own come first."""
        return (*self.teachers, *(run.name for run in self.table.runs))

    def summary(self, name: str) -> Summary | None:
        """The record of a finished run."""
        path = self._record_of(name)
        return read_summary(path) if path.exists() else None

    def _record_of(self, name: str) -> Path:
        return self.record / "runs" / f"{name}.jsonl"

    def planned(self, name: str) -> Planned:
        """The declared run of that name."""
        return next(run for run in self.table.runs if run.name == name)

    def is_done(self, name: str) -> bool:
        """Whether nothing is left to do; a teacher that an open regime takes must be at hand."""
        done = self._record_of(name).exists()
        if done and name in self.teachers and not is_finished(self._save(name)):
            return not self._is_wanted(name)
        return done

    def _is_wanted(self, name: str) -> bool:
        """Whether an open regime takes a checkpoint of this teacher, as far as is known."""
        open_ones = (regime for regime in self.table.regimes if not self._is_chosen(regime))
        try:
            return name in [self._choice(regime)["teacher"] for regime in open_ones]
        except ValueError:  # not all teachers are trained, or none fits
            return False

    def is_ready(self, name: str) -> bool:
        """Whether all that decides about a run is known."""
        if name in self.teachers:
            return True
        run = self.planned(name)
        alone = run.arm.name == PLAIN.name or self._is_chosen(run.regime)
        before = () if alone else (*self.teachers, *self._plain_tuning)
        return all(self.is_done(needed) for needed in (*run.needs, *before))

    def best(self, names: Sequence[str]) -> Summary:
        """The finished run with the lowest last validation loss; the earlier one of equals."""
        found = [self.summary(name) for name in names]
        return min((summary for summary in found if summary is not None), key=lambda s: s.loss)

    def overview(self) -> str:
        """A line for each run: done, begun, open."""
        lines = [self._state(name) for name in self.names]
        done = sum(self._record_of(name).exists() for name in self.names)
        return "\n".join([*lines, f"{done} of {len(lines)} runs are done."])

    def _state(self, name: str) -> str:
        group = "teacher" if name in self.teachers else self.planned(name).group
        summary, save = self.summary(name), self._save(name)
        state = "open"
        if summary is not None:
            state = f"loss {summary.loss:.3f}"
        elif (save / "metrics.jsonl").exists():
            evaluations = read_run(save).evaluations
            state = f"begun, step {evaluations[-1].iteration if evaluations else 0}"
        return f"{group:9} {name:24} {state}"

    @property
    def _plain_tuning(self) -> tuple[str, ...]:
        plain = next(run.arm for run in self.table.runs)
        return plain.tuning_runs

    # --- a run ----------------------------------------------------------------------------------

    def perform(self, name: str, minutes: float | None) -> None:
        """Make a run, or go on with it, and write its record if it gets to the end in time."""
        facts: dict[str, Any] = {"name": name, "label": name, "method": "baseline"}
        if name in self.teachers:
            model, seed = self.teachers[name], 1
            flags = self._teacher_flags(model)
            evaluations = self.table.teacher_checkpoints
        else:
            run = self.planned(name)
            with self._one_at_a_time:
                model, flags, facts = self._resolve(run)
            seed, evaluations = run.seed, self.table.recipe.evaluations
        facts["flags"] = flags.replace(f"{self.record}/", "docs/study/").replace(f"{ROOT}/", "")
        if minutes is not None:
            flags += f" --exit-duration-in-mins {max(1, int(minutes))}"
        log = self.quickstart.train(model, self._save(name), seed, evaluations, flags)
        if log.finished:
            self._keep(name, facts)

    def _save(self, name: str) -> Path:
        return self.folder / "runs" / name

    def _keep(self, name: str, facts: dict[str, Any]) -> None:
        with self._one_at_a_time:
            exported = self.quickstart.export(self._save(name), self.folder / "exported" / name)
        scores = score_model(exported, self.texts, self.table.recipe.seq_length)
        # The log's own hash holds the path of the data.
        recipe = self.table.recipe
        facts["data"] = f"{recipe.train_bytes} bytes in rows of {recipe.seq_length}"
        facts["machine"] = self._machine
        write_summary(self._record_of(name), self._save(name), facts, scores)

    def _resolve(self, run: Planned) -> tuple[Model, str, dict[str, Any]]:
        """What the runs before this one have decided: rate, setting, the layers' layout."""
        rate, setting = run.rate, run.setting
        if isinstance(setting, tuple):
            chosen = self.best(setting).facts["setting"]
            setting = next(s for s in run.arm.settings if s.name == chosen)
        if isinstance(rate, tuple):
            factor = setting.rate_factor if run.group == "tuning" else 1.0
            rate = factor * self.best(rate).facts["rate"]
        depth = setting.depth
        if run.depth_from:
            depth = self.best(run.depth_from).facts["depth"]
        model = replace(self.table.recipe.student, lr=rate)
        facts = {
            "name": run.name,
            "label": run.arm.label,
            "method": "baseline" if run.arm.name == PLAIN.name else run.arm.name,
            "arm": run.arm.name,
            "group": run.group,
            "regime": run.regime,
            "control": run.control,
            "rate": rate,
            "setting": setting.name,
            "depth": depth,
        }
        return model, self._flags(run, setting, depth), facts

    def _flags(self, run: Planned, setting: Setting, depth: str | None) -> str:
        steps = self.table.recipe.student.steps
        flags = re.sub(
            r"\{([\d.]+)\}", lambda share: str(round(float(share[1]) * steps)), setting.flags
        )
        flags += " --save-keep-last 1"
        if "--method baseline" not in flags:
            flags += f" --teacher-model {self.teacher_folder(run.regime)}"
            flags += f" --teacher-control {run.control}" * (run.control is not None)
        if depth is not None:
            trained = run.control != "random"
            flags += f" --pretrained-checkpoint {self._grown(run.regime, depth, trained)}"
        return flags

    def _grown(self, regime: str, depth: str, trained: bool) -> Path:
        """The student that starts as a grown teacher, checked, as Megatron loads it."""
        name = f"{regime}-{depth}" + "-untrained" * (not trained)
        folder = self.folder / "grown" / name
        if not folder.exists():
            student = self.table.recipe.student
            teacher, model = self.teacher_folder(regime), folder.with_name(f"{name}-hf")
            if not trained:
                teacher = untrained(teacher, folder.with_name(f"{name}-small"))
            convert_checkpoint.main(
                f"grow --hf-model {teacher} --output {model} --hidden-size {student.hidden} "
                f"--num-layers {student.layers} --ffn-hidden-size {student.ffn} "
                f"--num-attention-heads {student.heads} --num-query-groups {student.heads} "
                f"--depth {depth}".split()
            )
            convert_checkpoint.main(
                f"from-hf --hf-model {model} --output {folder} --verify".split()
            )
        return folder

    # --- the teacher ----------------------------------------------------------------------------

    def _teacher_flags(self, teacher: Model) -> str:
        # Grown, the epsilon becomes the student's 1e-5.
        epsilon = 1e-5 * self.table.recipe.student.hidden / teacher.hidden
        every = teacher.steps // self.table.teacher_checkpoints
        return f"--method baseline --norm-epsilon {epsilon:.8g} --save-interval {every}"

    def _is_chosen(self, regime: str) -> bool:
        return (self.record / "teachers" / regime / "chosen.json").exists()

    def teacher_folder(self, regime: str) -> Path:
        """The teacher of a regime as a Hugging Face folder.

        All are chosen when the first is asked for, as long as the checkpoints are at hand. Raises
        ValueError if no checkpoint makes this regime.
        """
        trained = all(is_finished(self._save(name)) for name in self.teachers)
        for name in self.table.regimes:
            try:
                if not self._is_chosen(name) and (trained or name == regime):
                    self._choose_teacher(name)
            except ValueError as error:
                if name == regime:
                    raise
                print(f"{name}: {error}", flush=True)
        return self.record / "teachers" / regime

    def _choose_teacher(self, regime: str) -> None:
        chosen = self._choice(regime)
        folder = self.record / "teachers" / regime
        shutil.rmtree(folder, ignore_errors=True)  # left by a killed call
        load = f"to-hf --load {self._save(chosen['teacher'])} --ckpt-step {chosen['iteration']}"
        convert_checkpoint.main(f"{load} --output {folder} --dtype bf16".split())
        (folder / "chosen.json").write_text(json.dumps(chosen, indent=1) + "\n")

    def _choice(self, regime: str) -> dict[str, Any]:
        runs = [self._teacher_run(name) for name in self.teachers]
        plain = self.best(self._plain_tuning).run
        return choose_checkpoint(runs, plain, self.table.regimes[regime])

    def _teacher_run(self, name: str) -> Run:
        """A teacher's training, on this machine or on the one that the record is of."""
        save, record = self._save(name), self._record_of(name)
        if not is_finished(save) and not record.exists():
            raise ValueError(f"{name} is still in training: its last checkpoint is not known")
        return read_run(save if is_finished(save) else record)


def choose_checkpoint(teachers: Sequence[Run], plain: Run, regime: Regime) -> dict[str, Any]:
    """Return which checkpoint of which teacher makes a regime: the first that fits its window.

    Its step, tokens, FLOPs and loss, and after which part of its run plain training passes it for
    good (None: never). Raises ValueError if none fits.
    """
    seen = []
    for run in teachers:
        found = _nearest(run, plain, regime.share)
        cost = cost_to_target(plain, found.loss)
        passed = None if cost is None else cost.steps / plain.train_iters
        chosen = {"teacher": run.name, "passed": passed} | asdict(found)
        low, high = regime.window
        if low <= (math.inf if passed is None else passed) <= high:
            return chosen
        seen.append(f"{run.name}, step {found.iteration}, loss {found.loss:.3f}: {passed}")
    raise ValueError(
        f"plain training must pass the teacher after {low} to {high} of its run, and passes after "
        f"({'; '.join(seen)}): change the teachers or the regime in table.py"
    )


def _nearest(teacher: Run, plain: Run, share: float | None) -> Evaluation:
    """The teacher's evaluation nearest to plain training's loss after `share`; else its last."""
    if share is None:
        return teacher.final
    target = loss_at(plain, Cost(share * plain.train_iters, 0.0, 0.0), "steps")
    assert target is not None  # the share lies within the run
    return min(teacher.evaluations, key=lambda evaluation: abs(evaluation.loss - target))


def untrained(teacher: Path, folder: Path) -> Path:
    """Write an untrained model of a teacher's shape; returns its folder."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = AutoConfig.from_pretrained(teacher, trust_remote_code=False)
        AutoModelForCausalLM.from_config(config, trust_remote_code=False).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(teacher, trust_remote_code=False)
    tokenizer.save_pretrained(folder)
    return folder
