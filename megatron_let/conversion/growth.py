"""A small Llama or Qwen2 in the shape of a larger one: each tensor of that, when it is asked for.

The residual stream of the large model is the small one's, padded with zeros (`pad`) or repeated
(`clone`: HyperCloning, arXiv 2409.12903). What writes to it gets rows of zeros, or its rows
repeated; what reads from it gets random columns, which meet zeros, or its columns repeated and
divided. RMSNorm divides by the root mean square over all features: a padded one's weight shrinks
by `sqrt(d / D)`, its epsilon by `d / D`. Whole heads are placed; what reads unused ones is zero.

Shapes: d, D hidden size of the small and the large model; h, H size of a head.
"""

import hashlib
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from megatron_let.errors import UsageError
from megatron_let.planning.shapes import ModelShape

NOISE_DB = 10.0
"""How far noise between two copies stays below the weights (HyperCloning's)."""
INIT_STD = 0.02
"""Of what is new in what reads the residual stream: Megatron's default."""
WRITERS = ("o_proj", "down_proj")

Read = Callable[[str], torch.Tensor]
"""Of a tensor by Hugging Face's name."""


@dataclass(frozen=True)
class Growth:
    """How it is done."""

    width: str = "pad"
    """`pad`, or `clone`: repeat what divides evenly."""
    depth: str = "identity"
    """New layers: `identity` add nothing, `stack` repeats all of them, `interleave` each."""
    symmetry: str = "none"
    """What sets copies apart: cancelling `noise`, or `next-layer`'s neurons (bert2BERT's AKI)."""
    seed: int = 0

    def is_exact(self, old: ModelShape, new: ModelShape) -> bool:
        """Whether the large model computes what the small one does."""
        same_depth = old.num_layers == new.num_layers or self.depth == "identity"
        return same_depth and self.symmetry != "next-layer"


Index = slice | torch.Tensor


def _neighbours(index: torch.Tensor) -> Index:
    """Indices that follow each other as a slice, which is copied at once, or not at all."""
    first, end = int(index[0]), int(index[0]) + len(index)
    return slice(first, end) if torch.equal(index, torch.arange(first, end)) else index


class Axis(NamedTuple):
    """One axis of the large model's tensors."""

    source: torch.Tensor
    """`[large]`: the small model's index of each, or -1 where there is none."""
    copies: int = 1
    """How often each index occurs where all copies are added up: what reads them divides by it."""

    @property
    def is_new(self) -> torch.Tensor:
        """Where there is nothing."""
        return self.source < 0

    @property
    def is_later_copy(self) -> torch.Tensor:
        """Where an index has occurred before."""
        position = torch.arange(len(self.source))
        return (position >= len(self.source) // self.copies) & ~self.is_new

    def placed(self) -> tuple[Index, Index]:
        """Where there is something, and the small model's index of it."""
        place = (~self.is_new).nonzero()[:, 0]
        return _neighbours(place), _neighbours(self.source[place])


# --- where everything goes ---------------------------------------------------------------------


def widened(old: int, new: int, width: str) -> Axis:
    """The old indices, then new ones; or repeated where that is wanted and divides evenly."""
    if width == "clone" and new % old == 0:
        return Axis(torch.arange(old).repeat(new // old), new // old)
    return Axis(torch.cat([torch.arange(old), torch.full((new - old,), -1)]))


def head_axes(old: ModelShape, new: ModelShape, width: str) -> dict[str, Axis]:
    """The axes of queries, keys, values and of what `o_proj` reads.

    Teacher group g goes to as many whole groups as its query heads need; each has heads of one
    teacher group only. Rotary positions turn the pair (i, i + h/2) by theta^(-2i/h): in a head of m
    times the size the pair of the same angle is (m i, m i + H/2).
    """
    heads, groups = old.num_attention_heads, old.num_query_groups
    times, sizes = new.num_attention_heads // heads, (old.kv_channels, new.kv_channels)
    same = (new.num_attention_heads, new.num_query_groups) == (times * heads, times * groups)
    if width == "clone" and same and sizes[0] == sizes[1]:
        query, key = (
            Axis(torch.arange(number * sizes[0]).repeat(times), times) for number in (heads, groups)
        )
        return {"query": query, "read": query, "key": key, "value": key}
    per_group, new_per_group = heads // groups, new.num_attention_heads // new.num_query_groups
    needed = math.ceil(per_group / new_per_group)
    placed = torch.full((new.num_attention_heads,), -1)
    placed_groups = torch.full((new.num_query_groups,), -1)
    for head in range(heads):
        group, place = divmod(head, per_group)
        new_group = group * needed + place // new_per_group
        placed[new_group * new_per_group + place % new_per_group] = head
        placed_groups[new_group] = group
    return {
        "query": Axis(_in_heads(placed, *sizes, turned=True)),
        "key": Axis(_in_heads(placed_groups, *sizes, turned=True)),
        "value": Axis(_in_heads(placed_groups, *sizes, turned=False)),
        "read": Axis(_in_heads(placed, *sizes, turned=False)),
    }


def _in_heads(heads: torch.Tensor, old: int, new: int, *, turned: bool) -> torch.Tensor:
    """The rows of placed heads, in pairs that turn alike or one after the other."""
    half = torch.arange(old // 2) * (new // old)
    row = torch.full((new,), -1)
    row[torch.cat([half, half + new // 2]) if turned else slice(0, old)] = torch.arange(old)
    rows = heads[:, None] * old + row
    return torch.where((heads[:, None] < 0) | (row < 0), -1, rows).flatten()


def depth_map(old: int, new: int, depth: str) -> list[tuple[int, bool]]:
    """For each new layer the old one that it is made of, and whether it adds nothing."""
    if depth == "stack":
        return [(layer % old, False) for layer in range(new)]
    made_of = [layer * old // new for layer in range(new)]
    is_later = [layer > 0 and made_of[layer] == made_of[layer - 1] for layer in range(new)]
    return [(o, later and depth == "identity") for o, later in zip(made_of, is_later, strict=True)]


# --- the tensors -------------------------------------------------------------------------------

# Rows, and columns that are read; an embedding's are written.
MATRICES = {
    "embed_tokens": ("vocabulary", "written"),
    "q_proj": ("query", "residual"),
    "k_proj": ("key", "residual"),
    "v_proj": ("value", "residual"),
    "o_proj": ("residual", "read"),
    "gate_proj": ("ffn", "residual"),
    "up_proj": ("ffn", "residual"),
    "down_proj": ("residual", "ffn"),
    "lm_head": ("vocabulary", "residual"),
}


class Grown:
    """The large model's tensors by Hugging Face's names, in float32.

    `read` gives those of the small model, which must fit. What is random comes from the seed and
    the tensor's name alone, so any rank may make any part.
    """

    def __init__(self, read: Read, old: ModelShape, new: ModelShape, growth: Growth) -> None:
        check(old, new, growth)
        self._read, self._old, self._new, self._growth = read, old, new, growth
        residual = widened(old.hidden_size, new.hidden_size, growth.width)
        self._axes = head_axes(old, new, growth.width) | {
            "residual": residual,
            "written": residual._replace(copies=1),
            "ffn": widened(old.ffn_hidden_size, new.ffn_hidden_size, growth.width),
            "vocabulary": Axis(torch.arange(old.vocab_size)),
        }
        self._layers = depth_map(old.num_layers, new.num_layers, growth.depth)

    def read(self, name: str) -> torch.Tensor:
        """Return one of them."""
        layer = re.search(r"\.layers\.(\d+)\.", name)
        origin, adds_nothing = self._layers[int(layer[1])] if layer else (0, False)
        small = self._of_small(name, origin)
        kind, part = name.split(".")[-2:]
        if part == "bias":
            rows = self._axes[MATRICES[kind][0]]
            return torch.where(rows.is_new, 0.0, small[rows.source]) * self._turned(kind)
        if kind not in MATRICES:
            return self._norm(small)
        following = small
        if layer and self._growth.symmetry == "next-layer":
            following = self._of_small(name, min(origin + 1, self._old.num_layers - 1))
        grown = self._matrix(name, kind, small, following)
        return torch.zeros_like(grown) if adds_nothing and kind in WRITERS else grown

    def _of_small(self, name: str, layer: int) -> torch.Tensor:
        name = re.sub(r"(?<=\.layers\.)\d+", str(layer), name)
        if name == "lm_head.weight" and self._old.tied:
            name = "model.embed_tokens.weight"
        return self._read(name).float()

    def _norm(self, small_d: torch.Tensor) -> torch.Tensor:
        axis = self._axes["residual"]
        weight_D = torch.where(axis.is_new, 1.0, small_d[axis.source])
        used = (~axis.is_new).sum().item()
        return weight_D * math.sqrt(used / self._new.hidden_size)

    def _turned(self, kind: str) -> float:
        """What makes up for the softmax's division by the root of a larger head."""
        return math.sqrt(self._new.kv_channels / self._old.kv_channels) if kind == "q_proj" else 1.0

    def _matrix(
        self, name: str, kind: str, small: torch.Tensor, following: torch.Tensor
    ) -> torch.Tensor:
        """Later copies of a neuron, a row or what reads it, come from the following matrix."""
        digest = hashlib.sha256(f"{self._growth.seed} {name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
        rows, columns = (self._axes[axis] for axis in MATRICES[kind])
        grown = self._fill(kind, torch.Size((len(rows.source), len(columns.source))), generator)
        (used, row), (read, column) = rows.placed(), columns.placed()
        block = small[row][:, column]
        if following is not small:
            neurons = rows.is_later_copy[used, None], columns.is_later_copy[read]
            block = torch.where(neurons[kind in WRITERS], following[row][:, column], block)
        # Heads are placed in the rows or in the columns: the other index is a slice.
        grown[used, read] = block * (self._turned(kind) / columns.copies)
        if self._growth.symmetry == "noise" and columns.copies > 1:
            _add_noise(grown, columns.copies, generator)
        return grown

    def _fill(self, kind: str, shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
        if kind in (*WRITERS, "embed_tokens"):
            return torch.zeros(shape)
        fill = torch.randn(shape, generator=generator).mul_(INIT_STD)
        if kind == "k_proj":  # in a used head, new pairs must not meet the queries' random rows
            keys = self._axes["key"].source.view(self._new.num_query_groups, -1)
            is_used = (keys >= 0).any(dim=1, keepdim=True)
            fill[((keys < 0) & is_used).flatten()] = 0.0
        return fill


def _add_noise(grown: torch.Tensor, copies: int, generator: torch.Generator) -> None:
    """To pairs of copies noise of opposite sign: what both read is the same, so it cancels."""
    blocks = grown.chunk(copies, dim=1)
    for one, other in zip(blocks[::2], blocks[1::2], strict=False):
        level = (one.square().mean() / 10 ** (NOISE_DB / 10)).sqrt()
        noise = torch.randn(one.shape, generator=generator) * level
        one += noise
        other -= noise


# --- what cannot be ----------------------------------------------------------------------------


def check(old: ModelShape, new: ModelShape, growth: Growth) -> None:
    """Refuse a shape that the small model does not fit into, and flags without effect."""
    for name in ("hidden_size", "ffn_hidden_size", "num_layers"):
        small, large = getattr(old, name), getattr(new, name)
        if large < small:
            flag = f"--{name.replace('_', '-')}"
            raise UsageError(f"{flag} {large} is smaller than the small model's {small}.")
    heads, groups, width = new.num_attention_heads, new.num_query_groups, new.hidden_size
    per_group = old.num_attention_heads // old.num_query_groups
    needed = old.num_query_groups * math.ceil(per_group / (heads // groups))
    is_clone, untie = growth.width == "clone", "--untie-embeddings-and-output-weights"
    for is_wrong, words in (
        (
            new.kv_channels % old.kv_channels,
            f"--kv-channels {new.kv_channels} is no multiple of the small model's "
            f"{old.kv_channels}: its rotary positions do not nest. Choose a multiple.",
        ),
        (width % heads, f"--hidden-size {width} is no multiple of --num-attention-heads {heads}."),
        (
            needed > groups,
            f"--num-query-groups {groups} of {heads // groups} query heads cannot hold the small "
            f"model's {old.num_query_groups} groups of {per_group}: at least {needed} are needed.",
        ),
        (
            is_clone and (width % old.hidden_size or width == old.hidden_size),
            f"clone repeats the small model's {old.hidden_size} features: --hidden-size {width} "
            "is no multiple. Choose one, or pad.",
        ),
        (
            is_clone and new.tied,
            f"clone needs {untie}: the output layer reads what the embedding writes several "
            "times, and must divide.",
        ),
        (
            new.tied and not old.tied,
            f"The small model's output layer is not its embedding: add {untie}.",
        ),
        (
            growth.symmetry != "none" and not is_clone,
            f"symmetry {growth.symmetry} has no effect with pad, which makes no copies: "
            "what is new there is random. Leave it out.",
        ),
    ):
        if is_wrong:
            raise UsageError(words)


def grown_config(config: Any, new: ModelShape, growth: Growth) -> dict[str, Any]:
    """Return the fields of the large model's Hugging Face configuration."""
    fields, used = config.to_dict(), config.hidden_size
    fields.pop("layer_types", None)  # one for each layer; made anew
    if growth.width == "clone":
        used *= new.hidden_size // config.hidden_size
    return fields | {
        "hidden_size": new.hidden_size,
        "intermediate_size": new.ffn_hidden_size,
        "num_hidden_layers": new.num_layers,
        "num_attention_heads": new.num_attention_heads,
        "num_key_value_heads": new.num_query_groups,
        "head_dim": new.kv_channels,
        "rms_norm_eps": config.rms_norm_eps * used / new.hidden_size,
        "tie_word_embeddings": new.tied,
    }
