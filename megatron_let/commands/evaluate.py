"""Evaluate exported models side by side: the paper's nine tasks, or the loss on held-out text.

    megatron-let evaluate tasks plain=runs/plain-hf let=runs/let-hf --output runs/evaluation
    megatron-let evaluate text runs/plain-hf runs/let-hf --input pile/test.jsonl.zst

What is done of an --output is not done again.
"""

import os
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

if not sys.stderr.isatty():
    os.environ.setdefault("TQDM_DISABLE", "1")  # the harness draws bars everywhere

from megatron_let import hugging_face
from megatron_let.commands import labelled, mistakes_told, number, tool_parser
from megatron_let.data import sources
from megatron_let.errors import UsageError
from megatron_let.evaluation.harness import PAPER_TASKS, Harness, TaskScore, find_tasks, local_data
from megatron_let.upstream import gpus

# What imports torch and transformers is imported late: --help does without.

DTYPES = ("auto", "float32", "bfloat16", "float16")


def _build_parser() -> ArgumentParser:
    parser = tool_parser(__doc__, "evaluate", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    add_parser = partial(commands.add_parser, allow_abbrev=False)
    tasks = add_parser("tasks", help="one-shot accuracy by lm-evaluation-harness")
    names = ", ".join(task.name for task in PAPER_TASKS)
    tasks.add_argument("--tasks", nargs="+", metavar="TASK", help=f"default: {names}")
    data = "data sets as DIR/OWNER/NAME, for a machine without internet (default: the hub)"
    tasks.add_argument("--task-data", type=Path, metavar="DIR", help=data)
    shots = partial(number, least=0)
    tasks.add_argument("--num-fewshot", type=shots, default=1, help="default: %(default)s")
    tasks.add_argument("--limit", type=number, metavar="N", help="only so many questions a task")
    text = add_parser("text", help="perplexity and bits per byte on held-out text")
    text.add_argument("--input", nargs="+", required=True, help="files as preprocess reads")
    text.add_argument("--json-key", default="text", help="default: %(default)s")
    rows = 'a row for each value of KEY in "meta", such as pile_set_name'
    text.add_argument("--by-meta", metavar="KEY", help=rows)
    text.add_argument("--context", type=number, metavar="N", help="default: all the model reads")
    text.add_argument("--stride", type=number, metavar="N", help="default: half the context")
    for command in (tasks, text):
        command.add_argument("models", nargs="+", metavar="[LABEL=]FOLDER", help="exported models")
        command.add_argument("--output", type=Path, required=True, metavar="DIR", help="results")
        command.add_argument("--dtype", choices=DTYPES, default="auto", help="default: as saved")
        rows = "sequences at once, a number: no auto (default: %(default)s)"
        command.add_argument("--batch-size", type=number, default=8, metavar="N", help=rows)
        command.add_argument("--device", help="default: cuda, or cpu where no GPU is promised")
    return parser


def _labelled(words: Sequence[str]) -> dict[str, Path]:
    """The folders by their labels, a folder's name unless one is given."""
    found: dict[str, Path] = {}
    for word in words:
        label, folder = labelled(word)
        label = label or os.path.basename(os.path.abspath(folder))  # of "." too
        if label in found or "/" in label:
            raise UsageError(f"{word} needs a label of its own: LABEL={folder}.")
        found[label] = folder
    return found


def _evaluate_tasks(options: Namespace) -> str:
    from megatron_let.evaluation.results import Results, accuracy_table, identity

    tasks = find_tasks(options.tasks)
    if options.task_data is not None:
        tasks = local_data(tasks, options.task_data)
    scores: dict[str, dict[str, TaskScore]] = {}
    for label, folder in _labelled(options.models).items():
        about = {
            "model": identity(folder),
            "shots": options.num_fewshot,
            "limit": options.limit,
            "task data": None if options.task_data is None else str(options.task_data.absolute()),
            "dtype": options.dtype,
        }
        results = Results(options.output / f"{label}-tasks.json", about)
        harness = None
        for task in tasks:
            if task.name in results:
                continue
            harness = harness or Harness(folder, options.dtype, options.device, options.batch_size)
            print(f"{label}: {task.name}", file=sys.stderr, flush=True)
            score = harness.score(task, options.num_fewshot, options.limit)
            results.keep(task.name, asdict(score))
        scores[label] = {task.name: TaskScore(**results[task.name]) for task in tasks}
    return accuracy_table(scores, options.num_fewshot)


def _evaluate_text(options: Namespace) -> str:
    from transformers import AutoModelForCausalLM

    from megatron_let.conversion.tokenizer_files import load_tokenizer
    from megatron_let.evaluation.perplexity import TextScore, read_documents, score_text
    from megatron_let.evaluation.results import Results, identity, text_table

    paths = sources.expand(options.input)
    stats = {path: Path(path).stat() for path in paths}
    read = partial(read_documents, paths, options.json_key, options.by_meta)
    if not sum(len(document.text) for document in read()):  # a bad record is told before the work
        given = f"--input {' '.join(options.input)}"
        raise UsageError(f"{given} holds no text in --json-key {options.json_key}.")
    scores: dict[str, dict[str, TextScore]] = {}
    contexts: dict[str, int] = {}
    for label, folder in _labelled(options.models).items():
        model_files = identity(folder)
        context, stride = _windows(folder, options)
        contexts[label] = context
        about = {
            "model": model_files,
            "input": {path: [stat.st_size, stat.st_mtime_ns] for path, stat in stats.items()},
            "json key": options.json_key,
            "by meta": options.by_meta,
            "context": context,
            "stride": stride,
            "dtype": options.dtype,
        }
        results = Results(options.output / f"{label}-text.json", about)
        if "subsets" not in results:
            print(f"{label}: {len(paths)} files", file=sys.stderr, flush=True)
            model = hugging_face.load(AutoModelForCausalLM, folder, dtype=options.dtype)
            model, tokenizer = model.to(options.device).eval(), load_tokenizer(folder)
            windows = {"context": context, "stride": stride}
            found = score_text(model, tokenizer, read(), **windows, batch_size=options.batch_size)
            del model  # before the next one is loaded
            results.keep("subsets", {subset: asdict(score) for subset, score in found.items()})
        scores[label] = {name: TextScore(**score) for name, score in results["subsets"].items()}
    text = text_table(scores)
    if len(set(contexts.values())) > 1:
        read_at_once = ", ".join(f"{label} {context}" for label, context in contexts.items())
        text += f"\n\nTokens read at once: {read_at_once}. To compare, give all one --context."
    return text


def _windows(folder: Path, options: Namespace) -> tuple[int, int]:
    from transformers import AutoConfig

    longest = hugging_face.context(hugging_face.load(AutoConfig, folder))
    context = options.context or longest
    if context == sys.maxsize:
        raise UsageError(f"{folder} reads texts of any length: tell how much at once by --context.")
    stride = options.stride or max(context // 2, 1)
    if context > longest:
        raise UsageError(f"--context {context}: {folder} reads 1 to {longest} tokens.")
    if stride > context:
        raise UsageError(f"--stride {stride} must be 1 to --context {context}, or tokens get lost.")
    return context, stride


def _default_device() -> str:
    """The GPU, or the CPU with a word; ends the process where a GPU is promised."""
    import torch

    if torch.cuda.is_available():
        return "cuda"
    gpus.fall_back("no GPU: evaluating on CPU", "--device cpu", sys.stderr)
    return "cpu"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the tool; a mistake of the user ends in one paragraph and exit status 2."""
    parser = _build_parser()
    options = parser.parse_args(arguments)
    evaluate = {"tasks": _evaluate_tasks, "text": _evaluate_text}[options.command]

    from safetensors import SafetensorError

    options.device = options.device or _default_device()
    kinds = (ValueError, OSError, RuntimeError, AssertionError, SafetensorError)
    with mistakes_told(parser, kinds):
        print(evaluate(options))
