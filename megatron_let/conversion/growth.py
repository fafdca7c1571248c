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
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch

from megatron_let.errors import UsageError

NOISE_DB = 10.0
"""How far noise between two copies stays below the weights (HyperCloning's)."""
INIT_STD = 0.02
"""Of what is new in what reads the residual stream: Megatron's default."""
WRITERS = ("o_proj", "down_proj")


@dataclass(frozen=True)
class Sizes:
    """Of one model."""

    hidden: int
    ffn: int
    layers: int
    heads: int
    groups: int
    """Key and value heads."""
    head_dim: int
    tied: bool

    @classmethod
    def of(cls, config: Any) -> "Sizes":
        """Those of a Hugging Face configuration."""
        heads = config.num_attention_heads
        return cls(
            hidden=config.hidden_size,
            ffn=config.intermediate_size,
            layers=config.num_hidden_layers,
            heads=heads,
            groups=config.num_key_value_heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
            tied=config.tie_word_embeddings,
        )


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

    def is_exact(self, old: Sizes, new: Sizes) -> bool:
        """Whether the large model computes what the small one does."""
        same_depth = old.layers == new.layers or self.depth == "identity"
        return same_depth and self.symmetry != "next-layer"


class Reader(Protocol):
    """The small model's tensors."""

    def read(self, name: str) -> torch.Tensor:
        """Return one."""


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


# --- where everything goes ---------------------------------------------------------------------


def padded(old: int, new: int) -> Axis:
    """The old indices, then new ones."""
    return Axis(torch.cat([torch.arange(old), torch.full((new - old,), -1)]))


def widened(old: int, new: int, width: str) -> Axis:
    """Repeated where that is wanted and divides evenly."""
    if width == "clone" and new % old == 0:
        return Axis(torch.arange(old).repeat(new // old), new // old)
    return padded(old, new)


def head_axes(old: Sizes, new: Sizes, width: str) -> dict[str, Axis]:
    """The axes of queries, keys, values and of what `o_proj` reads.

    Teacher group g goes to as many whole groups as its query heads need; each has heads of one
    teacher group only. Rotary positions turn the pair (i, i + h/2) by theta^(-2i/h): in a head of m
    times the size the pair of the same angle is (m i, m i + H/2).
    """
    times = new.heads // old.heads
    repeats = width == "clone" and new.head_dim == old.head_dim
    if repeats and (new.heads, new.groups) == (times * old.heads, times * old.groups):
        query, key = (
            Axis(torch.arange(number * old.head_dim).repeat(times), times)
            for number in (old.heads, old.groups)
        )
        return {"query": query, "read": query, "key": key, "value": key}
    per_group, new_per_group = old.heads // old.groups, new.heads // new.groups
    needed = math.ceil(per_group / new_per_group)
    heads, groups = torch.full((new.heads,), -1), torch.full((new.groups,), -1)
    for head in range(old.heads):
        group, place = divmod(head, per_group)
        new_group = group * needed + place // new_per_group
        heads[new_group * new_per_group + place % new_per_group] = head
        groups[new_group] = group
    turned = new.head_dim > old.head_dim
    sizes = old.head_dim, new.head_dim
    return {
        "query": Axis(_in_heads(heads, *sizes, turned)),
        "key": Axis(_in_heads(groups, *sizes, turned)),
        "value": Axis(_in_heads(groups, *sizes, False)),
        "read": Axis(_in_heads(heads, *sizes, False)),
    }


def _in_heads(heads: torch.Tensor, old: int, new: int, turned: bool) -> torch.Tensor:
    """The rows of placed heads, in pairs that turn alike or one after the other."""
    row = torch.full((new,), -1)
    place = torch.arange(old)
    if turned:
        half = torch.arange(old // 2) * (new // old)
        place = torch.cat([half, half + new // 2])
    row[place] = torch.arange(old)
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

    What is random comes from the seed and the tensor's name alone, so any rank may make any part.

    Args:
        small: the small model's tensors.
        old, new: both models' sizes.
        growth: how.

    Raises:
        UsageError: the small model does not fit into the large one.
    """

    def __init__(self, small: Reader, old: Sizes, new: Sizes, vocabulary: int, growth: Growth):
        check(old, new, growth)
        self._small, self._old, self._new, self._growth = small, old, new, growth
        residual = widened(old.hidden, new.hidden, growth.width)
        self._axes = head_axes(old, new, growth.width) | {
            "residual": residual,
            "written": residual._replace(copies=1),
            "ffn": widened(old.ffn, new.ffn, growth.width),
            "vocabulary": padded(vocabulary, vocabulary),
        }
        self._layers = depth_map(old.layers, new.layers, growth.depth)

    def read(self, name: str) -> torch.Tensor:
        """Return one of them."""
        layer = re.search(r"\.layers\.(\d+)\.", name)
        origin, adds_nothing = self._layers[int(layer[1])] if layer else (0, False)
        small = self._of_small(name, origin)
        kind, part = name.split(".")[-2:]
        if part == "bias":
            return self._bias(kind, small)
        if kind not in MATRICES:
            return self._norm(small)
        grown = self._matrix(name, kind, small, self._next(name, kind, origin))
        return torch.zeros_like(grown) if adds_nothing and kind in WRITERS else grown

    def _of_small(self, name: str, layer: int) -> torch.Tensor:
        name = re.sub(r"(?<=\.layers\.)\d+", str(layer), name)
        if name == "lm_head.weight" and self._old.tied:
            name = "model.embed_tokens.weight"
        return self._small.read(name).float()

    def _next(self, name: str, kind: str, layer: int) -> torch.Tensor | None:
        """The next layer's matrix, if later copies of neurons are to come from there."""
        if self._growth.symmetry != "next-layer" or ".layers." not in name:
            return None
        return self._of_small(name, min(layer + 1, self._old.layers - 1))

    def _norm(self, small_d: torch.Tensor) -> torch.Tensor:
        axis = self._axes["residual"]
        weight_D = torch.where(axis.is_new, 1.0, small_d[axis.source])
        used = (~axis.is_new).sum().item()
        return weight_D * math.sqrt(used / self._new.hidden)

    def _bias(self, kind: str, small: torch.Tensor) -> torch.Tensor:
        rows = self._axes[MATRICES[kind][0]]
        return torch.where(rows.is_new, 0.0, small[rows.source]) * self._turned(kind)

    def _turned(self, kind: str) -> float:
        """What makes up for the softmax's division by the root of a larger head."""
        return math.sqrt(self._new.head_dim / self._old.head_dim) if kind == "q_proj" else 1.0

    def _matrix(
        self, name: str, kind: str, small: torch.Tensor, following: torch.Tensor | None
    ) -> torch.Tensor:
        rows, columns = (self._axes[axis] for axis in MATRICES[kind])
        generator = self._generator(name)
        grown = small[rows.source][:, columns.source]
        if following is not None:
            neurons = rows.is_later_copy[:, None] if kind not in WRITERS else columns.is_later_copy
            grown = torch.where(neurons, following[rows.source][:, columns.source], grown)
        grown = grown * (self._turned(kind) / columns.copies)
        is_new = rows.is_new[:, None] | columns.is_new
        if is_new.any():
            fill = self._fill(kind, grown.shape, generator)
            grown = torch.where(is_new, fill, grown)
        if self._growth.symmetry == "noise" and columns.copies > 1:
            self._add_noise(grown, columns.copies, generator)
        return grown

    def _fill(self, kind: str, shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
        if kind in (*WRITERS, "embed_tokens"):
            return torch.zeros(shape)
        fill = torch.randn(shape, generator=generator) * INIT_STD
        if kind == "k_proj":  # in a used head, new pairs must not meet the queries' random rows
            keys = self._axes["key"].source.view(self._new.groups, self._new.head_dim)
            is_used = (keys >= 0).any(dim=1, keepdim=True)
            fill[((keys < 0) & is_used).flatten()] = 0.0
        return fill

    @staticmethod
    def _add_noise(grown: torch.Tensor, copies: int, generator: torch.Generator) -> None:
        """To pairs of copies noise of opposite sign: what both read is the same, so it cancels."""
        blocks = grown.chunk(copies, dim=1)
        for one, other in zip(blocks[::2], blocks[1::2], strict=False):
            level = (one.square().mean() / 10 ** (NOISE_DB / 10)).sqrt()
            noise = torch.randn(one.shape, generator=generator) * level
            one += noise
            other -= noise

    def _generator(self, name: str) -> torch.Generator:
        digest = hashlib.sha256(f"{self._growth.seed} {name}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


# --- what cannot be ----------------------------------------------------------------------------


def check(old: Sizes, new: Sizes, growth: Growth) -> None:
    """Refuse a shape that the small model does not fit into, and flags without effect.

    Raises:
        UsageError: naming the size and what would do.
    """
    for flag, small, large in (
        ("--hidden-size", old.hidden, new.hidden),
        ("--ffn-hidden-size", old.ffn, new.ffn),
        ("--num-layers", old.layers, new.layers),
    ):
        if large < small:
            raise UsageError(f"{flag} {large} is smaller than the small model's {small}.")
    if new.head_dim % old.head_dim or new.head_dim < old.head_dim:
        raise UsageError(
            f"--kv-channels {new.head_dim} is no multiple of the small model's {old.head_dim}: its "
            "rotary positions do not nest. Choose a multiple."
        )
    if new.hidden % new.heads:
        raise UsageError(
            f"--hidden-size {new.hidden} is no multiple of --num-attention-heads {new.heads}, as "
            "transformers wants it."
        )
    if new.heads % new.groups:
        raise UsageError(
            f"--num-attention-heads {new.heads} is no multiple of --num-query-groups {new.groups}."
        )
    needed = math.ceil(old.heads / old.groups / (new.heads // new.groups))
    if old.groups * needed > new.groups:
        raise UsageError(
            f"--num-query-groups {new.groups} of {new.heads // new.groups} query heads cannot hold "
            f"the small model's {old.groups} groups of {old.heads // old.groups}: at least "
            f"{old.groups * needed} are needed."
        )
    if growth.width == "clone" and (new.hidden % old.hidden or new.hidden == old.hidden):
        raise UsageError(
            f"--width clone repeats the small model's {old.hidden} features: --hidden-size "
            f"{new.hidden} is no multiple. Choose one, or --width pad."
        )
    if growth.width == "clone" and new.tied:
        raise UsageError(
            "--width clone needs --untie-embeddings-and-output-weights: the output layer reads "
            "what the embedding writes several times, and must divide."
        )
    if new.tied and not old.tied:
        raise UsageError(
            "The small model's output layer is not its embedding: add "
            "--untie-embeddings-and-output-weights."
        )
    if growth.symmetry != "none" and growth.width != "clone":
        raise UsageError(
            f"--symmetry {growth.symmetry} has no effect with --width pad, which makes no copies: "
            "what is new there is random. Leave it out."
        )


def grown_config(config: Any, new: Sizes, growth: Growth) -> Mapping[str, Any]:
    """Return the fields of the large model's Hugging Face configuration."""
    fields = config.to_dict()
    fields.pop("layer_types", None)  # one for each layer; made anew
    used = config.hidden_size
    if growth.width == "clone":
        used *= new.hidden // config.hidden_size
    return fields | {
        "hidden_size": new.hidden,
        "intermediate_size": new.ffn,
        "num_hidden_layers": new.layers,
        "num_attention_heads": new.heads,
        "num_key_value_heads": new.groups,
        "head_dim": new.head_dim,
        "rms_norm_eps": config.rms_norm_eps * used / new.hidden,
        "tie_word_embeddings": new.tied,
    }
