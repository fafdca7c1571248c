"""What `pretrain_let.py` reads from: the command line and the model's configuration."""

import importlib.util
import os
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

from megatron.core.datasets import utils as dataset_utils
from megatron.core.transformer.multi_token_prediction import get_mtp_ranks
from megatron.training import get_tokenizer
from megatron.training.argument_utils import core_transformer_config_from_args, gpt_config_from_args
from megatron.training.arguments import parse_and_validate_args, parse_args

from megatron_let import arguments
from megatron_let.errors import UsageError
from megatron_let.methods.base import Method

# Modes of `pretrain_gpt.py` that need batches of another form than documents packed to sequences.
UNSUPPORTED_FLAGS = (
    "sft fim_data logits_load_dir logits_save_dir hybrid_context_parallel perform_rl_step "
    "dataloader_inter_document_masking"
).split()


def use_prebuilt_helpers() -> None:
    """Keep Megatron from compiling the dataset helpers that its wheel already brings.

    The wheel has no makefile, so upstream's call ends the run although nothing is missing.
    """
    if importlib.util.find_spec("megatron.core.datasets.helpers_cpp") is not None:
        dataset_utils.compile_helpers = lambda: None


def parse_arguments() -> Namespace:
    """Parse and check the command line; sets Megatron's globals (`parse_and_validate_args`).

    Raises:
        UsageError: a flag of ours, a mode of Megatron's or a path that can't be right.
    """
    if not any("fsdp" in word for word in sys.argv):
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # Megatron demands it with TP
    flags = parse_args(arguments.add_arguments)
    arguments.check_flags(flags, sys.argv)
    _refuse_unsupported(flags)
    _check_data_paths(flags)
    defaults = {"tokenizer_type": "GPT2BPETokenizer"}
    args = parse_and_validate_args(arguments.add_arguments, args_defaults=defaults)
    arguments.check_flags(args, sys.argv)  # fills in the defaults that depend on other flags
    return args


def _refuse_unsupported(args: Namespace) -> None:
    for name in UNSUPPORTED_FLAGS:
        if vars(args).get(name):
            raise UsageError(
                f"--{name.replace('_', '-')} is not supported by pretrain_let.py: it trains on "
                "documents packed to sequences. Use Megatron-LM's pretrain_gpt.py for it."
            )


def _check_data_paths(args: Namespace) -> None:
    given = [args.data_path, args.train_data_path, args.valid_data_path, args.test_data_path]
    for prefix in (word for paths in given for word in paths or []):
        files = [Path(f"{prefix}.bin"), Path(f"{prefix}.idx")]
        if _is_number(prefix) or all(file.exists() for file in files):
            continue
        raise UsageError(
            f"No data at {prefix}: {files[0].name} and {files[1].name} must both exist there. "
            "Write them with tools/preprocess_data.py, and give their path without the ending."
        )


def _is_number(word: str) -> bool:
    """Whether a word of a blend is a weight."""
    try:
        float(word)
    except ValueError:
        return False
    return True


def model_config(args: Namespace, method: Method) -> Any:
    """Return Megatron's `GPTModelConfig` with what the method changes in it."""
    config = gpt_config_from_args(args)
    method.check_tokens(_student_token_ids(args))
    method.configure(config)
    return config


def _student_token_ids(args: Namespace) -> dict[str, int]:
    if args.tokenizer_type != "HuggingFaceTokenizer":
        return {}
    return get_tokenizer()._tokenizer.tokenizer.get_vocab()


def embedding_ranks(args: Namespace) -> Any:
    """Return the function that tells Megatron which pipeline ranks hold an embedding."""
    config = core_transformer_config_from_args(args)

    def get_embedding_ranks(pp_ranks: list[int]) -> list[int]:
        ranks = {pp_ranks[0]}
        if len(pp_ranks) > 1:
            ranks.update(get_mtp_ranks(pp_ranks, config))
            if not args.untie_embeddings_and_output_weights:
                ranks.add(pp_ranks[-1])
        return sorted(ranks)

    return get_embedding_ranks
