"""The paper's nine tasks by lm-evaluation-harness: one-shot accuracy (arXiv 2602.05393)."""

import functools
import logging
import math
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_let import hugging_face
from megatron_let.errors import UsageError, first_line


@dataclass(frozen=True)
class Task:
    """A task of the harness and its data set."""

    name: str
    folder: str
    """Where the harness describes it."""
    dataset: str
    """On the hub, or a path on this machine."""
    subset: str | None
    chance: float
    """Accuracy of guessing."""


PAPER_TASKS = (
    Task("hellaswag", "hellaswag", "Rowan/hellaswag", None, 1 / 4),
    Task("winogrande", "winogrande", "allenai/winogrande", "winogrande_xl", 1 / 2),
    Task("lambada_openai", "lambada", "EleutherAI/lambada_openai", "default", 0.0),
    Task("openbookqa", "openbookqa", "allenai/openbookqa", "main", 1 / 4),
    Task("arc_easy", "arc", "allenai/ai2_arc", "ARC-Easy", 1 / 4),
    Task("arc_challenge", "arc", "allenai/ai2_arc", "ARC-Challenge", 1 / 4),
    Task("piqa", "piqa", "baber/piqa", None, 1 / 2),
    Task("sciq", "sciq", "allenai/sciq", None, 1 / 4),
    Task("boolq", "super_glue/boolq", "aps/super_glue", "boolq", 1 / 2),
)


@dataclass(frozen=True)
class TaskScore:
    """What one model did on one task."""

    correct: list[int]
    """1 or 0 for every question, in the data set's order."""
    normalized: float | None
    """Accuracy by the choices' likelihoods over their lengths (`acc_norm`), if there is one."""
    cut: int
    """Prompts longer than the model's context, which lost their beginning."""


def find_tasks(names: Sequence[str] | None) -> list[Task]:
    """Return the tasks of these names, all nine without; raises UsageError for any other."""
    known = {task.name: task for task in PAPER_TASKS}
    for name in names or ():
        if name not in known:
            raise UsageError(
                f"--tasks {name} is none of {', '.join(known)}. For others run lm_eval itself on "
                "the exported folder: lm_eval --model hf --model_args pretrained=FOLDER."
            )
    return [known[name] for name in names or known]


def local_data(tasks: Iterable[Task], folder: Path) -> list[Task]:
    """Return the tasks with their data sets below a folder, FOLDER/OWNER/NAME[/SUBSET].

    Raises UsageError, which names every missing data set and the command that gets it.
    """
    found, missing = [], []
    for task in tasks:
        path = folder / task.dataset
        if task.subset is not None and (path / task.subset).is_dir():
            path, subset = path / task.subset, None
        else:  # a folder with a README tells which of its files are which subset
            subset = task.subset if (path / "README.md").is_file() else None
        if not path.is_dir():
            missing.append(task.dataset)
        found.append(replace(task, dataset=str(path.absolute()), subset=subset))
    if missing:
        commands = [
            f"  hf download --repo-type dataset {name} --local-dir {folder / name}"
            for name in dict.fromkeys(missing)
        ]
        what = f"--task-data {folder} lacks {len(commands)} data sets. Where there is internet:"
        raise UsageError("\n".join([what, *commands]))
    return found


class Harness:
    """lm-evaluation-harness with the model of an exported folder.

    `dtype` is that of the weights, "auto" as saved; `batch_size` counts sequences.
    """

    def __init__(self, folder: Path, dtype: str, device: str, batch_size: int) -> None:
        from transformers import AutoConfig

        hugging_face.load(AutoConfig, folder)
        # Late: it takes seconds.
        from lm_eval import evaluator
        from lm_eval.models.huggingface import HFLM

        class Model(HFLM):
            """Draws progress bars on a terminal only."""

            loglikelihood = functools.partialmethod(
                HFLM.loglikelihood, disable_tqdm=not sys.stderr.isatty()
            )

        # Seconds for each task, of `pip list` and git's complaints, for what nobody reads here.
        evaluator.add_env_info = lambda results: None
        evaluator.get_git_commit_hash = lambda: None
        self._manager = _task_manager()
        with hugging_face.told(folder, weights=True):
            self._model = Model(
                pretrained=str(folder),
                tokenizer=str(hugging_face.own_folder(folder)),
                dtype=dtype,
                device=device,
                batch_size=batch_size,
                trust_remote_code=False,
            )
        if self._model.prefix_token_id is None:
            raise UsageError(
                f"{folder} has neither bos_token nor eos_token, which the harness begins a text "
                "with: name the end token of the training data in its tokenizer_config.json."
            )

    def score(self, task: Task, shots: int, limit: int | None) -> TaskScore:
        """Run one task with so many solved examples before each of its first `limit` questions.

        Raises UsageError if its data set cannot be loaded.
        """
        from lm_eval import simple_evaluate

        original = self._manager.task_index[task.name].yaml_path
        with _counted_cuts() as cuts, tempfile.TemporaryDirectory() as folder:
            described = Path(folder) / f"{task.name}.yaml"
            described.write_text(
                f"include: {original}\ntask: {task.name}\n"
                f"dataset_path: {task.dataset}\ndataset_name: {task.subset or 'null'}\n"
            )
            try:
                results = simple_evaluate(
                    model=self._model,
                    tasks=[str(described)],
                    num_fewshot=shots,
                    limit=limit,
                    bootstrap_iters=0,  # for perplexities, which are not reported
                    task_manager=self._manager,
                )
            except (OSError, ValueError) as error:
                reason = first_line(error)
                raise UsageError(
                    f"{task.name}: {task.dataset} cannot be loaded: {reason} Without internet give "
                    "the data sets with --task-data."
                ) from error
        samples = sorted(results["samples"][task.name], key=lambda sample: sample["doc_id"])
        likelihoods = [float(a[0]) for sample in samples for a in sample["filtered_resps"]]
        if any(map(math.isnan, likelihoods)):
            raise UsageError(f"{task.name}: an answer's likelihood is NaN: the model is damaged.")
        return TaskScore(
            correct=[int(sample["acc"]) for sample in samples],
            normalized=results["results"][task.name].get("acc_norm,none"),
            cut=len(cuts),
        )


@functools.cache
def _task_manager() -> Any:
    """The harness's index of the nine: to read all its thousands takes many seconds."""
    from lm_eval import tasks

    own = Path(tasks.__file__).parent
    folders = dict.fromkeys(str(own / task.folder) for task in PAPER_TASKS)
    return tasks.TaskManager(include_path=list(folders), include_defaults=False)


@contextmanager
def _counted_cuts() -> Iterator[list[str]]:
    """Collect the harness's warnings of prompts that were cut, instead of a line for each."""
    cuts: list[str] = []

    def keep(record: logging.LogRecord) -> bool:
        is_cut = "exceeds model's maximum length" in record.getMessage()
        if is_cut:
            cuts.append(record.getMessage())
        return not is_cut and record.levelno >= logging.ERROR

    names = [name for name in logging.root.manager.loggerDict if name.startswith("lm_eval")]
    with ExitStack() as stack:
        for logger in map(logging.getLogger, names):
            logger.addFilter(keep)
            stack.callback(logger.removeFilter, keep)
        yield cuts
