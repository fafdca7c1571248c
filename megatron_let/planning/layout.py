"""How a run lies on its GPUs: ranks, and the layers of each pipeline stage."""

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Literal

from megatron_let.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Megatron's parallel layout, and what it keeps of the activations."""

    gpus: int
    tp: int = 1  # tensor-parallel ranks
    pp: int = 1  # pipeline stages
    cp: int = 1  # context-parallel ranks: parts of each sequence
    vpp: int = 1  # virtual chunks on each stage; 1 is the plain 1F1B schedule
    sequence_parallel: bool | None = None  # None: with tensor parallelism
    distributed_optimizer: bool = True
    recompute: Literal["none", "selective", "full"] = "none"
    """selective drops the attention scores, full all but the inputs of layers."""
    flash_attention: bool = True
    """Attention scores are never stored; otherwise those of every layer, unless recomputed."""
    first_stage_layers: int | None = None  # `--decoder-first-pipeline-num-layers`
    last_stage_layers: int | None = None  # `--decoder-last-pipeline-num-layers`

    def __post_init__(self) -> None:
        for name in ("gpus", "tp", "pp", "cp", "vpp"):
            if getattr(self, name) < 1:
                raise UsageError(f"--{name} {getattr(self, name)} must be at least 1.")
        if self.gpus % (self.sharing * self.pp):
            context = f" x --cp {self.cp}" * (self.cp > 1)
            raise UsageError(
                f"--gpus {self.gpus} is not a multiple of --tp {self.tp} x --pp {self.pp}{context} "
                f"= {self.sharing * self.pp}. Change one of them."
            )
        if self.pp == 1 and (self.vpp > 1 or self.split_flags):
            raise UsageError(
                "--vpp and --decoder-first/last-pipeline-num-layers have no effect with --pp 1. "
                "Remove them, or set --pp."
            )
        if self.sequence_parallel and self.tp == 1:
            raise UsageError("--sequence-parallel has no effect with --tp 1. Remove it.")

    @property
    def dp(self) -> int:
        """Data-parallel ranks."""
        return self.gpus // (self.sharing * self.pp)

    @property
    def sharing(self) -> int:
        """Ranks of a stage that work on the same micro-batch."""
        return self.tp * self.cp

    @property
    def sequence_shards(self) -> int:
        """Parts of the sequence that tensor-parallel ranks hold between the matrix products."""
        return self.tp if self.sequence_parallel in (None, True) else 1

    @property
    def split_flags(self) -> str:
        """The flags that say an uneven split, empty for an even one."""
        flags = {"first": self.first_stage_layers, "last": self.last_stage_layers}
        return " ".join(
            f"--decoder-{end}-pipeline-num-layers {layers}"
            for end, layers in flags.items()
            if layers is not None
        )

    def split(self, num_layers: int) -> tuple[int, ...]:
        """Layers of each stage; raises UsageError where Megatron would refuse this split."""
        if (layers := self._split_or_none(num_layers)) is not None:
            return layers
        chunks = f" of {self.vpp} virtual chunks" if self.vpp > 1 else ""
        ends = f" with {self.split_flags}" if self.split_flags else ""
        way_out = "Use fewer stages or chunks, or another number of layers."
        possible = [(max(layout.split(num_layers)), layout) for layout in self.splits(num_layers)]
        if possible:
            _, evenest = min(possible, key=lambda pair: (pair[0], len(pair[1].split_flags)))
            flags = f"use {evenest.split_flags}" if evenest.split_flags else "split evenly"
            way_out = f"Change --pp, or {flags}."
        raise UsageError(
            f"{num_layers} layers do not divide over {self.pp} pipeline stages{chunks}{ends}. "
            f"{way_out}"
        )

    def _split_or_none(self, num_layers: int) -> tuple[int, ...] | None:
        first, last = (
            [] if layers is None else [layers]
            for layers in (self.first_stage_layers, self.last_stage_layers)
        )
        middle_stages = self.pp - len(first) - len(last)
        middle_layers = num_layers - sum(first + last)
        middle = [middle_layers // max(1, middle_stages)] * middle_stages
        stages = (*first, *middle, *last)
        fits = sum(stages) == num_layers and min(stages) > 0
        return stages if fits and not any(layers % self.vpp for layers in stages) else None

    def splits(self, num_layers: int) -> Iterator["Layout"]:
        """Every split that Megatron takes, those with fewer flags first."""
        sizes = range(self.vpp, num_layers, self.vpp)
        ends: list[tuple[int | None, int | None]] = [(None, None)]
        if self.pp > 1:
            ends += [(size, None) for size in sizes] + [(None, size) for size in sizes]
            ends += [(first, last) for first in sizes for last in sizes]
        for first, last in ends:
            layout = replace(self, first_stage_layers=first, last_stage_layers=last)
            if layout._split_or_none(num_layers) is not None:
                yield layout

    def place(self, num_layers: int, layer: int) -> tuple[int, int]:
        """The stage of a layer, counted from 1, and its virtual chunk there (0 without those)."""
        assert 1 <= layer <= num_layers
        chunk_layers = [layers // self.vpp for layers in self.split(num_layers)]
        # The chunks of a round lie stage after stage, round after round.
        ends = list(accumulate(chunk_layers))
        chunk, index = divmod(layer - 1, ends[-1])
        return bisect_right(ends, index), chunk
