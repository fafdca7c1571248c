"""What a dry run reads of a command line, and what it changes in it.

Data, tokenizer and teacher that are not on this machine are replaced by what has the same sizes.
"""

import json
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from pathlib import Path

from megatron_let.errors import UsageError
from megatron_let.planning.huggingface import TEACHERS

RESULT = "MEGATRON_LET_DRY_RUN"
"""In the environment of a process that is one rank: the file for what it found."""
AS_IF = "--transformer-impl=transformer_engine"
"""What its kernels keep is known by shapes."""
DATA = (
    "data-path train-data-path valid-data-path test-data-path data-args-path "
    "per-split-data-args-path"
).split()
WITH_DATA = (
    "data-cache-path per-dataset-sequences-path full-validation multiple-validation-sets "
    "kd-selection"
).split()
TRACKERS = ("tensorboard-dir", "wandb-project")
SWITCHES = (
    "use-tp-pp-dp-mapping multi-latent-attention use-megatron-fsdp use-torch-fsdp2 "
    "enable-cuda-graph external-cuda-graph use-checkpoint-args skip-train"
).split()
_KERNELS, _SHARDS = "its kernels are not known by shapes", "it moves shards on its own"
UNSEEN = {
    "context_parallel_size": "only Transformer Engine has attention over parts of a sequence",
    "num_experts": "how many tokens an expert gets, only data tells",
    "multi_latent_attention": _KERNELS,
    "fp8_format": _KERNELS,
    "fp4_format": _KERNELS,
    "use_megatron_fsdp": _SHARDS,
    "use_torch_fsdp2": _SHARDS,
    "cuda_graph_impl": "nothing is captured",
    "enable_cuda_graph": "nothing is captured",
    "external_cuda_graph": "nothing is captured",
    "use_checkpoint_args": "no checkpoint is read",
    "skip_train": "it has no step",
}
"""What a rank on tensors without contents cannot do, and why."""


def parse(argv: Sequence[str]) -> Namespace:
    """Read the flags that matter here; all others are the program's."""
    parser = ArgumentParser(prog="pretrain_let.py", add_help=False, allow_abbrev=False)
    for name in ("tensor", "pipeline"):
        parser.add_argument(f"--{name}-model-parallel-size", type=int, default=1)
    parser.add_argument("--context-parallel-size", type=int, default=1)
    parser.add_argument("--num-experts", type=int)
    for name in ("fp8-format", "fp4-format"):
        parser.add_argument(f"--{name}")
    parser.add_argument("--cuda-graph-impl", default="none")
    parser.add_argument("--step-batch-size-schedule")
    for name in SWITCHES:
        parser.add_argument(f"--{name}", action="store_true")
    parser.add_argument("--transformer-impl")
    parser.add_argument("--tokenizer-model")
    parser.add_argument("--teacher-model")
    for name in DATA:
        parser.add_argument(f"--{name}", nargs="+", default=[])
    parser.add_argument("--dry-run-world-size", type=int)
    parser.add_argument("--dry-run-ranks", default="one-per-stage")
    parser.add_argument("--dry-run-gpu-memory", type=float, default=80.0)
    return parser.parse_known_args(argv)[0]


def world_size(options: Namespace) -> int:
    """GPUs of the run; without a word of it the fewest that the layout takes.

    Raises:
        UsageError: the layout does not divide them.
    """
    model = (
        options.tensor_model_parallel_size
        * options.pipeline_model_parallel_size
        * options.context_parallel_size
    )
    world = model if options.dry_run_world_size is None else options.dry_run_world_size
    if world < 1 or world % model:
        raise UsageError(
            f"--dry-run-world-size {world} is no multiple of the {model} GPUs that TP x PP x CP "
            "take: give one."
        )
    return world


def ranks(options: Namespace, world: int) -> list[int]:
    """The ranks to run.

    Raises:
        UsageError: they are no numbers of ranks.
    """
    stages = options.pipeline_model_parallel_size
    if options.dry_run_ranks == "one-per-stage":
        inner = options.tensor_model_parallel_size * options.context_parallel_size
        step = inner if options.use_tp_pp_dp_mapping else world // stages
        return [stage * step for stage in range(stages)]
    words = options.dry_run_ranks.split(",")
    if not all(word.isdecimal() and int(word) < world for word in words):
        raise UsageError(
            f"--dry-run-ranks {options.dry_run_ranks}: give numbers from 0 to {world - 1}, with "
            "commas between them, or one-per-stage."
        )
    return sorted({int(word) for word in words})


def refuse_unseen(options: Namespace) -> None:
    """Raise UsageError if there is anything of `UNSEEN`."""
    plain = parse([])
    for name, why in UNSEEN.items():
        value = vars(options)[name]
        if value != vars(plain)[name]:
            flag = f"--{name.replace('_', '-')}" + f" {value}" * (value is not True)
            raise UsageError(f"{flag} cannot be run dry: {why}. Leave it out here.")


def replaced(argv: Sequence[str], options: Namespace, folder: Path) -> tuple[list[str], list[str]]:
    """Replace what is not on this machine.

    Args:
        argv: the command line's words.
        options: of these.
        folder: a place for configurations.

    Returns:
        The words of a rank's command line, and what was replaced, a sentence each.
    """
    said: list[str] = []
    is_local = options.transformer_impl == "local"
    kept = [
        *without(argv, named(*TRACKERS)),
        "--cpu",
        "--fake-process-group",
        *([] if is_local else [AS_IF]),
    ]
    if (missing := _missing(options)) is not None:
        kept = [*without(kept, named(*DATA, *WITH_DATA)), "--mock-data"]
        said.append(f"the data ({missing} is not here) by Megatron's mock data")
    if options.step_batch_size_schedule is not None:
        said.append("all batches by the first one of --step-batch-size-schedule")
    tokenizer, teacher = options.tokenizer_model, options.teacher_model
    vocabulary, config = _known(tokenizer), _known(teacher)
    if vocabulary is not None:
        rows = vocabulary["vocab_size"]
        kept = without(kept, named("tokenizer-type", "tokenizer-model"))
        kept += ["--tokenizer-type", "NullTokenizer", "--vocab-size", str(rows - 1)]
        said.append(f"the tokenizer {tokenizer} by {rows:,} numbers")
    if vocabulary is not None and teacher is not None:
        if config is not None and config is not vocabulary:
            raise UsageError(
                f"--tokenizer-model {tokenizer} and --teacher-model {teacher} are not here, and "
                "only their tokenizers tell how long the teacher's rows are. Download both."
            )
        if config is None:
            said.append(f"whatever tokenizer {teacher} has by the student's")
    if config is not None:
        place = folder / teacher.rpartition("/")[2]
        place.mkdir()
        (place / "config.json").write_text(json.dumps(config))
        kept = [*without(kept, named("teacher-model")), "--teacher-model", str(place)]
        said.append(f"the config of {teacher} by its copy in tools/plan.py")
    return kept, said


def _missing(options: Namespace) -> str | None:
    """A path of the data that is not on this machine."""
    for name in DATA:
        ending = "" if name.endswith("args-path") else ".idx"
        for word in vars(options)[name.replace("-", "_")]:
            if not _is_number(word) and not Path(word + ending).exists():
                return word
    return None


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def _known(name: str | None) -> dict | None:
    """The config of a model of the hub that is known on paper."""
    if name is None or Path(name).exists():
        return None
    return TEACHERS.get(name.rpartition("/")[2].lower())


def without(words: Sequence[str], unwanted: Callable[[str], bool]) -> list[str]:
    """The words of a command line without the unwanted flags and their values."""
    kept, keep = [], True
    for word in words:
        if word.startswith("--"):
            keep = not unwanted(word.partition("=")[0])
        kept += [word] * keep
    return kept


def named(*names: str) -> Callable[[str], bool]:
    """Whether a flag is one of these, given without dashes."""
    return {f"--{name}" for name in names}.__contains__
