"""`--init-from`: the student starts from a small model, grown into its shape (docs/growth.md).

Each rank makes a layer's tensors of the small model's and keeps its own slices, in any layout.
"""

import math
from argparse import Namespace
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
from megatron.training import get_tokenizer

from megatron_let.checkpoint.door import Door
from megatron_let.conversion import configs
from megatron_let.conversion.from_hf import Source
from megatron_let.conversion.grow import grown_model, open_small
from megatron_let.conversion.growth import Growth
from megatron_let.errors import UsageError
from megatron_let.teacher.load import check_token_ids, read_token_ids
from megatron_let.training.arguments import InitFlags
from megatron_let.upstream.mended import token_ids

SIZES = "hidden_size ffn_hidden_size num_layers num_attention_heads kv_channels".split()

Read = Callable[[str, int | None], torch.Tensor]
"""Of a tensor of Megatron's by its name and, if it is stacked, the layer: the whole tensor."""


def grow(args: Namespace, door: Door, chunks: list[Any]) -> list[Any]:
    """Fill this rank's chunks, unless there is a checkpoint: a hook after `door` is settled.

    Raises:
        UsageError: the small model does not fit into the student, or has another tokenizer.
    """
    if door.chosen is not None:
        return chunks
    small, flags = open_small(args.init_from), InitFlags.of(args)
    growth = Growth(width=flags.init_width, depth=flags.init_depth, symmetry=flags.init_symmetry)
    grown, config, _ = grown_model(
        small,
        {name: vars(args)[name] for name in SIZES}
        | {
            "num_query_groups": configs.model_shape(args, 0).num_query_groups,
            "tied": not args.untie_embeddings_and_output_weights,
        },
        growth,
    )
    _check_student(args, small, configs.megatron_values(small.family, config))
    shape = configs.model_shape(args, small.config.vocab_size)
    rules = {rule.megatron: rule for rule in small.family.rules}
    for chunk in chunks:
        state = chunk.sharded_state_dict()
        apply_factories(state)  # composed tensors become views of their parts
        for tensor in nested_values(state):
            if isinstance(tensor, ShardedTensor) and tensor.key in rules:
                _fill(tensor, lambda name, layer: rules[name].join(grown.read, layer, shape))
    return chunks


def _check_student(args: Namespace, small: Source, needed: dict[str, Any]) -> None:
    free = ("init_method_std", "attention_dropout", "hidden_dropout", "max_position_embeddings")
    for name, need in needed.items():
        given = vars(args)[name]
        same = math.isclose(given, need, rel_tol=1e-6) if isinstance(need, float) else given == need
        if name not in free and not same:
            raise UsageError(
                f"--init-from {args.init_from}, grown, has {name}={need!r} "
                f"({configs.FLAG_OF[name]}), the student {name}={given!r}. Give it the same."
            )
    if args.padded_vocab_size < small.config.vocab_size:
        raise UsageError(
            f"--init-from {args.init_from} has {small.config.vocab_size} rows of tokens, the "
            f"student {args.padded_vocab_size}: it has another tokenizer."
        )
    if args.tokenizer_type == "HuggingFaceTokenizer":
        ids = read_token_ids(str(small.folder), None)
        if ids:
            check_token_ids(token_ids(get_tokenizer()), ids, args.init_from)


def _fill(tensor: ShardedTensor, read: Read) -> None:
    """Copy this rank's slice; rows that only pad the vocabulary stay as they are."""
    stacked = tensor.prepend_axis_num
    whole = read(tensor.key, tensor.global_offset[0] if stacked else None)
    bounds = zip(tensor.global_offset[stacked:], tensor.local_shape, strict=True)
    part = whole[tuple(slice(start, start + size) for start, size in bounds)]
    with torch.no_grad():
        tensor.data[tuple(slice(0, size) for size in part.shape)].copy_(part)
