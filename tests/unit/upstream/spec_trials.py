"""Run in a worker: every flag of Megatron tried, and the decoder's spec with a teacher and without.

Flags that shape the spec on one student are tried again with each flag that shapes it, so that
what needs another flag beside it (as --moe-layer-freq needs --num-experts) is found too.
"""

import argparse
import contextlib
import copy
import dataclasses
import functools
import io
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

from megatron.core import mpu
from megatron.core.extensions.transformer_engine import HAVE_TE, TENorm
from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider
from megatron.core.models.gpt import gpt_layer_specs
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    _get_block_submodules,
)
from megatron.training import arguments as megatron_arguments
from megatron.training.arguments import add_megatron_arguments, validate_args
from megatron.training.models.gpt import default_layer_spec

from megatron_let.losses.attach import Alignment, Resize
from megatron_let.losses.table import cosine
from megatron_let.training import arguments, command_line
from megatron_let.upstream.aligned_layer import aligned_block_spec, aligned_layer_class
from tests.support.testing import forget_last_run
from tests.unit.command_line import MODEL

LAYER = 2
STEPS = "--mock-data --train-iters 10 --eval-interval 5".split()
STUDENT = (*MODEL, *STEPS, *"--num-layers 3 --padded-vocab-size 256".split())
EXTRA = {
    "alignment": Alignment(cosine),
    "resize": functools.partial(Resize, "interpolate", student_width=32, teacher_width=48),
}
Words = tuple[str, ...]


@dataclasses.dataclass
class Found:
    """What the trials showed; a trial is what a command line has beside the plain student's."""

    shaping: dict[str, Words] = dataclasses.field(default_factory=dict)
    """A flag that changes the baseline's spec, and the first trial that showed it."""
    equal: list[Words] = dataclasses.field(default_factory=list)
    differing: list[Words] = dataclasses.field(default_factory=list)
    """Where the guided spec is not the baseline's but for layer K."""
    old_differing: list[Words] = dataclasses.field(default_factory=list)
    """Where it was not as long as it had a function of its own."""
    refused: dict[Words, str] = dataclasses.field(default_factory=dict)
    """What Megatron said of a trial that it took on no student."""

    def compare(self, words: Words, config: Any, baseline: TransformerBlockSubmodules) -> None:
        """Build the guided spec by both functions."""
        same = is_baseline_but_for_k(aligned_block_spec, config, baseline)
        (self.equal if same else self.differing).append(words)
        if not is_baseline_but_for_k(old_block_spec, config, baseline):
            self.old_differing.append(words)


def sweep() -> Found:
    """Try all flags."""
    forget_last_run()
    mpu.initialize_model_parallel()
    try:
        quiet = mock.patch.object(megatron_arguments, "_print_args")  # half of the time
        with _transformer_engine_by_name(), quiet, contextlib.redirect_stdout(None):
            with contextlib.redirect_stderr(io.StringIO()):
                return _sweep()
    finally:
        mpu.destroy_model_parallel()


def _sweep() -> Found:
    found, students = Found(), [()]
    trials = [trial for action in _parser()._actions for trial in _trials(action)]
    for student in students:  # which grow
        flags = _flags(student)
        config = _config(flags, ())
        before = tree(_baseline(config))
        for trial in list(trials):
            try:
                tried = _config(flags, trial)
                baseline = _baseline(tried)
            except (Exception, SystemExit) as error:
                if not student or trial in found.refused:
                    found.refused[trial] = f"{type(error).__name__}: {error}"
                continue
            found.refused.pop(trial, None)
            if not student and tree(tried) == tree(config):
                trials.remove(trial)  # no part of the model's configuration
            words = (*student, *trial)
            found.compare(words, tried, baseline)
            if trial[0] not in found.shaping and tree(baseline) != before:
                found.shaping[trial[0]] = words
                students.append(words)
    return found


# --- flags -------------------------------------------------------------------------------------


@functools.cache
def _parser() -> argparse.ArgumentParser:
    parser = add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
    return arguments.add_arguments(parser)


def _trials(action: argparse.Action) -> Iterator[Words]:
    """Set one flag: both ways, to each choice, or to 1 and 2; free text is not tried."""
    flag = max(action.option_strings, key=len)
    if isinstance(action, argparse.BooleanOptionalAction):
        yield from ((option,) for option in action.option_strings)
    elif isinstance(action, argparse._HelpAction):
        return
    elif action.nargs == 0:
        yield (flag,)
    elif action.choices is not None:
        yield from ((flag, str(getattr(value, "name", value))) for value in action.choices)
    elif action.type not in (None, str):
        yield from ((flag, number) for number in ("2", "1"))


def _flags(words: Words) -> argparse.Namespace:
    flags = _parser().parse_args([*STUDENT, *words])
    flags._is_global_batch_size_explicitly_specified = True
    flags.rank, flags.world_size = 0, 1
    return flags


def _config(flags: argparse.Namespace, more: Words) -> Any:
    """Megatron's `GPTModelConfig` for a command line, as a run makes it."""
    args = _parser().parse_args(more, copy.copy(flags))
    validate_args(args)
    return command_line.gpt_config(args)


# --- specs -------------------------------------------------------------------------------------


def _baseline(config: Any) -> TransformerBlockSubmodules:
    """The block that Megatron builds without a teacher."""
    return _get_block_submodules(config.transformer, default_layer_spec(config, None))


def is_baseline_but_for_k(
    build: Callable[..., Any], config: Any, baseline: TransformerBlockSubmodules
) -> bool:
    """Whether all is the same but for layer K's class, a subclass, and its two parameters."""
    try:
        guided, _ = build(config, None, layer_number=LAYER, **EXTRA)
    except AssertionError:  # of Megatron's, where the baseline has none
        return False
    layers = list(baseline.layer_specs)
    if LAYER <= len(layers):
        plain = layers[LAYER - 1]
        module, params = aligned_layer_class(plain.module), {**plain.params, **EXTRA}
        layers[LAYER - 1] = dataclasses.replace(plain, module=module, params=params)
        assert issubclass(module, plain.module)
    return tree(guided) == tree(dataclasses.replace(baseline, layer_specs=layers))


def tree(spec: Any) -> Any:
    """Nested tuples that can be compared, of dataclasses, partials and containers."""
    if dataclasses.is_dataclass(spec) and not isinstance(spec, type):
        names = (field.name for field in dataclasses.fields(spec))
        return (type(spec), *((name, tree(getattr(spec, name))) for name in names))
    if isinstance(spec, functools.partial):
        return (tree(spec.func), tree(spec.args), tree(spec.keywords))
    if isinstance(spec, dict):
        return tuple((key, tree(value)) for key, value in sorted(spec.items()))
    if isinstance(spec, (list, tuple)):
        once = {id(item): item for item in spec}  # layers share a spec
        trees = {key: tree(item) for key, item in once.items()}
        return tuple(trees[id(item)] for item in spec)
    return spec


def old_block_spec(
    config: Any, vp_stage: int | None, *, layer_number: int, **extra: Any
) -> tuple[TransformerBlockSubmodules, bool]:
    """The block as it once was made, whatever the baseline's function."""
    transformer = config.transformer
    block = gpt_layer_specs.get_gpt_decoder_block_spec(
        transformer,
        use_transformer_engine=transformer.transformer_impl == "transformer_engine",
        normalization=transformer.normalization,
        qk_l2_norm=transformer.qk_l2_norm,
        vp_stage=vp_stage,
    )
    if layer_number <= len(block.layer_specs):
        spec = block.layer_specs[layer_number - 1]
        block.layer_specs[layer_number - 1] = dataclasses.replace(
            spec, module=aligned_layer_class(spec.module), params={**spec.params, **extra}
        )
    return block, True


class _FusedMLP(MLP):
    """Stands for `TEFusedMLP`."""


class _GroupedMLP(MLP):
    """Stands for `TEFusedMLPWithGroupedLinear`."""


def _transformer_engine_by_name() -> contextlib.AbstractContextManager[Any]:
    """Where Transformer Engine is absent, let specs name its modules; none is built here."""
    if HAVE_TE:
        return contextlib.nullcontext()
    names = {"TESpecProvider": TESpecProvider, "TENorm": TENorm}
    fused = {"TEFusedMLP": _FusedMLP, "TEFusedMLPWithGroupedLinear": _GroupedMLP}
    return mock.patch.multiple(gpt_layer_specs, **names, **fused)
