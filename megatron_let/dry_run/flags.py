"""What a dry run reads of a command line, and what it changes in it.

Data, tokenizer and teacher that are not on this machine are replaced by what has the same sizes.
"""

import json
import re
from argparse import SUPPRESS, ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_let.errors import UsageError
from megatron_let.planning.shapes import TEACHERS
from megatron_let.program import TRACKERS, named, values_of, without

RESULT = "MEGATRON_LET_DRY_RUN"
"""In the environment of a process that is one rank: the file for what it found."""
AS_IF = "--transformer-impl=transformer_engine"  # what its kernels keep is known by shapes
DATA = (
    "data-path train-data-path valid-data-path test-data-path data-args-path "
    "per-split-data-args-path"
)
WEIGHT = re.compile(r"[\d.]+([eE][-+]?\d+)?")  # of a blend, before a path
WITH_DATA = (
    "data-cache-path per-dataset-sequences-path full-validation multiple-validation-sets "
    "kd-selection"
)
UNSEEN = {
    "only Transformer Engine has attention over parts of a sequence": "context-parallel-size",
    "how many tokens an expert gets, only data tells": "num-experts",
    "its kernels are not known by shapes": "multi-latent-attention fp8-format fp4-format",
    "it moves shards on its own": "use-megatron-fsdp use-torch-fsdp2",
    "nothing is captured": "cuda-graph-impl enable-cuda-graph external-cuda-graph",
    "no checkpoint is read": "use-checkpoint-args",
    "it has no step": "skip-train",
}
"""Why a rank on tensors without contents cannot do it: flags."""
SEEN = {"--context-parallel-size": "1", "--cuda-graph-impl": "none"}
"""Values of them that ask for nothing."""
FLAGS: dict[str, dict[str, Any]] = {
    "tensor-model-parallel-size pipeline-model-parallel-size": {"type": int, "default": 1},
    "context-parallel-size": {"type": int, "default": 1},
    "dry-run-world-size": {"type": int},
    "step-batch-size-schedule transformer-impl tokenizer-model teacher-model": {},
    "use-tp-pp-dp-mapping": {"action": "store_true"},
    DATA: {"nargs": "+", "default": []},
    "dry-run-ranks": {"default": "one-per-stage"},
    "dry-run-gpu-memory": {"type": float, "default": 80.0},
}
"""What is read of a command line, and how."""


def parse(argv: Sequence[str]) -> Namespace:
    """Read the flags that matter here; all others are the program's.

    Raises UsageError for one of `UNSEEN`, and if there is no memory to fit.
    """
    for name, value in values_of(argv).items():
        for why in (why for why, names in UNSEEN.items() if named(names)(name)):
            if value != SEEN.get(name):
                flag = name if value.startswith("--") else f"{name} {value}".rstrip()
                raise UsageError(f"{flag} cannot be run dry: {why}. Leave it out here.")
    parser = ArgumentParser("pretrain_let.py", SUPPRESS, add_help=False, allow_abbrev=False)
    for names, how in FLAGS.items():
        for name in names.split():
            parser.add_argument(f"--{name}", **how)
    options = parser.parse_known_args(argv)[0]
    if not 0 < options.dry_run_gpu_memory < float("inf"):
        raise UsageError(f"--dry-run-gpu-memory {options.dry_run_gpu_memory} must be positive.")
    return options


def world_size(options: Namespace) -> int:
    """GPUs of the run, by default the fewest; a UsageError if the layout does not divide them."""
    tp, pp = options.tensor_model_parallel_size, options.pipeline_model_parallel_size
    cp = options.context_parallel_size
    model = tp * pp * cp
    world = model if options.dry_run_world_size is None else options.dry_run_world_size
    if min(tp, pp, cp, world) < 1 or world % model:
        raise UsageError(
            f"--dry-run-world-size {world} is no multiple of the {model} GPUs that TP x PP x CP "
            "take: give one."
        )
    return world


def ranks(options: Namespace, world: int) -> list[int]:
    """The ranks to run; raises UsageError if they are no numbers of ranks."""
    stages = options.pipeline_model_parallel_size
    if options.dry_run_ranks == "one-per-stage":
        step = world // stages
        if options.use_tp_pp_dp_mapping:
            step = options.tensor_model_parallel_size * options.context_parallel_size
        return [stage * step for stage in range(stages)]
    words = options.dry_run_ranks.split(",")
    if not all(word.isdecimal() and int(word) < world for word in words):
        raise UsageError(
            f"--dry-run-ranks {options.dry_run_ranks}: give numbers from 0 to {world - 1}, with "
            "commas between them, or one-per-stage."
        )
    return sorted({int(word) for word in words})


def replaced(argv: Sequence[str], options: Namespace, folder: Path) -> tuple[list[str], list[str]]:
    """Replace what is not on this machine; `folder` is a place for configurations.

    Returns the words of a rank's command line, and what was replaced, a sentence each.
    """
    said: list[str] = []
    kept = without(argv, named(TRACKERS))
    kept += ["--cpu", "--fake-process-group"]
    kept += [AS_IF] * (options.transformer_impl != "local")
    if (missing := _missing(options)) is not None:
        kept = [*without(kept, named(f"{DATA} {WITH_DATA}")), "--mock-data"]
        said.append(f"the data ({missing} is not here) by Megatron's mock data")
    if options.step_batch_size_schedule is not None:
        said.append("all batches by the first one of --step-batch-size-schedule")
    tokenizer, teacher = options.tokenizer_model, options.teacher_model
    vocabulary, config = _known(tokenizer), _known(teacher)
    if vocabulary is not None:
        rows = vocabulary["vocab_size"]
        kept = without(kept, named("tokenizer-type tokenizer-model"))
        kept += ["--tokenizer-type", "NullTokenizer", "--vocab-size", str(rows)]
        said.append(f"the tokenizer {tokenizer} by {rows:,} numbers")
    if None not in (vocabulary, config) and config is not vocabulary:
        raise UsageError(
            f"--tokenizer-model {tokenizer} and --teacher-model {teacher} are not here, and "
            "only their tokenizers tell how long the teacher's rows are. Download both."
        )
    if None not in (tokenizer, teacher) and (vocabulary is None) != (config is None):
        said.append(f"whatever tokenizer {teacher} has by the student's")
    if config is not None:
        place = folder / teacher.rpartition("/")[2]
        place.mkdir()
        (place / "config.json").write_text(json.dumps(config))
        kept = [*without(kept, named("teacher-model")), "--teacher-model", str(place)]
        said.append(f"the config of {teacher} by the planner's copy")
    return kept, said


def _missing(options: Namespace) -> str | None:
    """A path of the data that is not on this machine."""
    for name in DATA.split():
        ending = "" if name.endswith("args-path") else ".idx"
        for word in vars(options)[name.replace("-", "_")]:
            if not WEIGHT.fullmatch(word) and not Path(word + ending).exists():
                return word
    return None


def _known(name: str | None) -> dict | None:
    """The config of a model of the hub that is known on paper."""
    if name is None or Path(name).exists():
        return None
    return TEACHERS.get(name.rpartition("/")[2].lower())
