"""`--init-from`: the student starts from a small model, grown into its shape (docs/growth.md).

Each rank makes a layer's tensors of the small model's and keeps its own slices, in any layout.
"""

import functools
import math
from argparse import Namespace
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
from megatron.training import get_tokenizer

from megatron_let.checkpoint.door import Door, agreed
from megatron_let.conversion import checks, configs
from megatron_let.conversion.from_hf import Source
from megatron_let.conversion.grow import grown_model, open_small
from megatron_let.conversion.growth import Growth
from megatron_let.errors import UsageError
from megatron_let.teacher.load import check_token_ids, read_token_ids
from megatron_let.training.arguments import InitFlags
from megatron_let.upstream.mended import known_token_ids

SIZES = "hidden_size ffn_hidden_size num_layers num_attention_heads kv_channels".split()
FREE = (
    "init_method_std attention_dropout hidden_dropout max_position_embeddings "
    "group_query_attention num_query_groups"  # the groups are those of `model_shape`
).split()
"""Arguments that the student may have as it likes."""
NO_SCALING = {"use_rope_scaling": False, "rotary_seq_len_interpolation_factor": None}


def grow(args: Namespace, door: Door, chunks: list[Any]) -> list[Any]:
    """Fill this rank's chunks, unless there is a checkpoint: a hook after `door` is settled.

    Raises UsageError if the small model does not fit into the student, or has another tokenizer; or
    if the checkpoint did not begin so.
    """
    if door.chosen is not None:
        if getattr(door.saved_args(args), "init_from", None) is None:
            raise UsageError(
                f"--init-from {args.init_from} has no effect: the run goes on from {door.chosen}, "
                "which did not begin so. Leave it out, or --load."
            )
        return chunks
    agreed(lambda: _grow(args, chunks))  # a tensor that one stage alone reads may be damaged
    return chunks


def _grow(args: Namespace, chunks: list[Any]) -> None:
    small, flags = open_small("--init-from", args.init_from), InitFlags.of(args)
    growth = Growth(width=flags.init_width, depth=flags.init_depth, symmetry=flags.init_symmetry)
    shape = configs.model_shape(args, small.config.vocab_size)
    sizes = {name: vars(args)[name] for name in SIZES}
    sizes["num_query_groups"] = shape.num_query_groups
    sizes["tied"] = not args.untie_embeddings_and_output_weights
    grown, config, _ = grown_model(small, sizes, growth)
    _check_student(args, small, configs.megatron_values(small.family, config))
    rules = {rule.megatron: rule for rule in small.family.rules}

    @functools.lru_cache(maxsize=1)  # a gated MLP's two halves are asked for one after the other
    def read(name: str, layer: int | None) -> torch.Tensor:
        return rules[name].join(grown.read, layer, shape)

    ours = checks.NOT_WEIGHTS
    for chunk in chunks:
        state = chunk.sharded_state_dict()
        apply_factories(state)  # composed tensors become views of their parts
        tensors = [tensor for tensor in nested_values(state) if isinstance(tensor, ShardedTensor)]
        weights = [tensor for tensor in tensors if not checks.is_not_weight(tensor.key, ours)]
        if others := sorted({tensor.key for tensor in weights} - rules.keys()):
            raise UsageError(
                f"--init-from {args.init_from}: the student has {', '.join(others[:5])}, which no "
                f"{small.family.name} has."
            )
        for tensor in weights:
            layer = tensor.global_offset[0] if tensor.prepend_axis_num else None
            _fill(tensor, read(tensor.key, layer))


def _check_student(args: Namespace, small: Source, needed: dict[str, Any]) -> None:
    needed = NO_SCALING | {name: need for name, need in needed.items() if name not in FREE}
    for name, need in needed.items():
        given = vars(args)[name]
        same = math.isclose(given, need, rel_tol=1e-6) if isinstance(need, float) else given == need
        if not same:
            raise UsageError(
                f"--init-from {args.init_from}, grown, has {name}={need!r} "
                f"({configs.FLAG_OF[name]}), the student {name}={given!r}. Give it the same."
            )
    for name, word in configs.MUST_BE_OFF.items():
        if vars(args).get(name):
            raise UsageError(f"{word} goes with no model of --init-from {args.init_from}.")
    if get_tokenizer().vocab_size > small.config.vocab_size:
        raise UsageError(
            f"--init-from {args.init_from} has {small.config.vocab_size} rows of tokens, the "
            f"student's tokenizer {get_tokenizer().vocab_size} tokens: it is another one."
        )
    own, ids = known_token_ids(args), read_token_ids(str(small.folder), None)
    if own and ids:
        check_token_ids(own, ids, args.init_from, "--init-from")


def _fill(tensor: ShardedTensor, whole: torch.Tensor) -> None:
    """Copy this rank's slice; rows that only pad the vocabulary are zeros, as where one loads."""
    offsets = tensor.global_offset[tensor.prepend_axis_num :]
    bounds = zip(offsets, tensor.local_shape, strict=True)
    part = whole[tuple(slice(start, start + size) for start, size in bounds)]
    with torch.no_grad():
        tensor.data.zero_()
        tensor.data[tuple(slice(0, size) for size in part.shape)].copy_(part)
