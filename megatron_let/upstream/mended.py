"""What is mended in Megatron for every run, whatever it runs on, and what it does not tell."""

import contextlib
import copy
import multiprocessing
import traceback
from argparse import Namespace
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.tokenizers.text.libraries import HuggingFaceTokenizer
from megatron.training import get_args, get_tokenizer
from megatron.training.argument_utils import gpt_config_from_args

from megatron_let.data.tokenizer import TOKENIZER_TYPES
from megatron_let.errors import UsageError
from megatron_let.hugging_face import remote_code
from megatron_let.upstream import datasets, optimizers, secrets
from megatron_let.upstream.table import Redirect, apply, around

REFUSALS = AssertionError, ArithmeticError, ImportError, KeyError, OSError, RuntimeError, ValueError


@around
def _marking_weights(new: Any, cls: Any, config: Any, *args: Any, **kwargs: Any) -> Any:
    """`WrappedTorchNorm.__new__` that marks its weights instead of refusing.

    Under sequence parallelism a norm sees a slice of the sequence, so its weights' gradients are
    partial sums; `finalize_model_grads` adds them over the TP group if the weights say so.
    """
    if not config.sequence_parallel:
        return new(cls, config, *args, **kwargs)
    unsharded = copy.copy(config)
    unsharded.sequence_parallel = False
    norm = new(cls, unsharded, *args, **kwargs)
    for parameter in norm.parameters():
        parameter.sequence_parallel = True
    return norm


@around
def _moving_first(wrap: Any, chunks: list[torch.nn.Module], config: Any, *rest: Any) -> Any:
    """The wrapper of the chunks: what --use-cpu-initialization drew goes to the GPU before."""
    waits = config.init_model_with_meta_device or get_args().use_torch_fsdp2
    if config.use_cpu_initialization and not waits:
        for chunk in chunks:
            chunk.cuda(torch.cuda.current_device())
    return wrap(chunks, config, *rest)


@contextlib.contextmanager
def refusals(kinds: tuple[type[Exception], ...] = REFUSALS) -> Iterator[None]:
    """What Megatron refuses by an assertion, or by another error of `kinds`, becomes a message."""
    try:
        yield
    except UsageError:
        raise  # a checkpoint's, of --use-checkpoint-args
    except kinds as error:
        # Some assertions have no words: then the violated condition speaks for itself.
        if "trust_remote_code" in str(error):
            raise remote_code("--tokenizer-model", "; or add --trust-remote-code") from error
        words = "" if isinstance(error, ArithmeticError) else str(error)
        words = words or traceback.extract_tb(error.__traceback__)[-1].line or ""
        words = f"{words} is unknown" if isinstance(error, KeyError) else words
        raise UsageError(f"Megatron-LM refuses these flags: {words}") from error


_NORM = "megatron.core.transformer.torch_norm.WrappedTorchNorm"
_MODELS = "megatron.training.models.dist_utils"
_BUILDER = "megatron.training.models.gpt.GPTModelBuilder"
TORCH_NORM = Redirect(_NORM, "__new__", _marking_weights, "refuses sequence parallelism")
"""For where Transformer Engine and Apex are missing."""
REDIRECTS = [
    *secrets.REDIRECTS,
    *datasets.REDIRECTS,
    TORCH_NORM,
    Redirect(_MODELS, "_wrap_with_mp_wrapper", _moving_first, "leaves weights on the CPU"),
    Redirect(_BUILDER, "build_model", refusals((AssertionError,)), "its layers assert flags"),
    *optimizers.REDIRECTS,
]


def mend_megatron() -> None:
    """Put it in place; before the command line is parsed."""
    apply(REDIRECTS)
    # Python 3.14's default asks for picklable functions, which those of Megatron's loaders are not.
    multiprocessing.set_start_method("fork", force=True)


def gpt_config(args: Namespace) -> Any:
    """Return Megatron's `GPTModelConfig`, with a flag that upstream loses on the way."""
    config = gpt_config_from_args(args)
    config.rope_scaling_factor = args.rope_scaling_factor
    return config


def known_token_ids(args: Namespace) -> dict[str, int]:
    """Every token's id of the run's tokenizer; none of a kind that does not name its tokens."""
    return token_ids(get_tokenizer()) if args.tokenizer_type in TOKENIZER_TYPES else {}


def token_ids(tokenizer: Any) -> dict[str, int]:
    """Return every token's id: what `data.tokenizer.Tokenizer.ids` is of ours."""
    if isinstance(tokenizer._tokenizer, HuggingFaceTokenizer):
        return tokenizer._tokenizer.tokenizer.get_vocab()
    return {str(token): index for index, token in enumerate(tokenizer.vocab)}
