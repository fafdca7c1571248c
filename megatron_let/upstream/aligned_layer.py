"""The seam to Megatron-Core: layer K of the decoder becomes one that carries the alignment.

The layer keeps its class and parameter names, so checkpoints of any method load in any other and
the export needs to know nothing. It is replaced in the spec, never patched on the instance.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.transformer import transformer_block
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from megatron.core.utils import make_viewless_tensor
from megatron.training.models.gpt import GPTModelConfig, default_layer_spec

from megatron_let.losses.attach import Alignment, Resize


@functools.cache
def aligned_layer_class(layer_class: type) -> type:
    """Return a subclass of a `TransformerLayer`'s class; a mixture of experts has its own."""

    class AlignedTransformerLayer(layer_class):  # type: ignore[misc, valid-type]
        """A layer whose output carries the alignment loss in its backward pass."""

        def __init__(
            self,
            config: TransformerConfig,
            *args: Any,
            alignment: Alignment,
            resize: Callable[[], Resize],
            **kwargs: Any,
        ) -> None:
            super().__init__(config, *args, **kwargs)
            self.alignment = alignment
            self.let_resize = resize().to(config.params_dtype)
            if torch.cuda.is_available() and not config.use_cpu_initialization:
                self.let_resize.cuda()
            for weight in self.let_resize.parameters():
                # Each rank sees its slice of the sequence, so the gradients are partial sums.
                weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

        def forward(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, Any]:
            """Run the layer; attach in the run that builds a graph, not in a checkpointed one."""
            output_SBH, context = super().forward(*args, **kwargs)
            if self.training and torch.is_grad_enabled():
                output_SBH = self.alignment.attach(output_SBH, self.let_resize)
                # A stage's output is freed after sending, which a view does not allow.
                output_SBH = make_viewless_tensor(output_SBH, requires_grad=True, keep_graph=True)
            return output_SBH, context

        def sharded_state_dict(
            self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
        ) -> dict[str, Any]:
            """Save the learned map beside the layers, which Megatron would stack it with."""
            state = super().sharded_state_dict(prefix, sharded_offsets, metadata)
            weights = self.let_resize.state_dict(keep_vars=True)
            return state | make_sharded_tensors_for_checkpoint(weights, f"{prefix}let_resize.")

    return AlignedTransformerLayer


def aligned_block_spec(
    config: GPTModelConfig,
    vp_stage: int | None,
    layer_number: int,
    alignment: Alignment,
    resize: Callable[[], Resize],
) -> tuple[transformer_block.TransformerBlockSubmodules, bool]:
    """Return this chunk's decoder spec, and whether it owns layer `layer_number` (1-based).

    It is the baseline's, made and expanded by Megatron's own functions, but for layer K. A spec
    object is shared by all layers of the block, so the entry is replaced, never changed.
    """
    transformer = config.transformer
    spec = default_layer_spec(config, vp_stage)
    block = transformer_block._get_block_submodules(transformer, spec, vp_stage)
    layers: list[ModuleSpec] = list(block.layer_specs)
    index = layer_number - 1 - get_transformer_layer_offset(transformer, vp_stage)
    owns = 0 <= index < len(layers)
    if owns:
        spec = layers[index]
        module = aligned_layer_class(spec.module)
        params = {**spec.params, "alignment": alignment, "resize": resize}
        layers[index] = dataclasses.replace(spec, module=module, params=params)
    return dataclasses.replace(block, layer_specs=layers), owns
