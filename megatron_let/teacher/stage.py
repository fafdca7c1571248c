"""The teacher's forward pass on the pipeline stage that owns the aligned layer."""

import math
from typing import Any

import torch
import torch.nn.functional as F


class Teacher:
    """A frozen model and its last-layer states. Not a module, so nothing can adopt its weights.

    Shapes: B batch, S sequence, D teacher width.
    """

    def __init__(self, causal_lm: Any) -> None:
        self._causal_lm = causal_lm
        self._base = causal_lm.base_model
        self.parameters = sum(weight.numel() for weight in causal_lm.parameters())
        self.matmul_parameters = _matmul_parameters(self._base)
        config = causal_lm.config
        self._attention_width = config.num_hidden_layers * config.hidden_size

    @torch.no_grad()
    def states_SBD(self, tokens_BS: torch.Tensor) -> torch.Tensor:
        """Return the states after the last layer and the final norm, sequence first."""
        output = self._base(input_ids=tokens_BS, use_cache=False)
        return output.last_hidden_state.transpose(0, 1).contiguous()

    @torch.no_grad()
    def lm_loss(
        self, tokens_BS: torch.Tensor, labels_BS: torch.Tensor, mask_BS: torch.Tensor
    ) -> float:
        """Return the mean next-token loss in nats over the tokens of the mask."""
        logits = self._causal_lm(input_ids=tokens_BS, use_cache=False).logits
        logits = logits.flatten(0, 1).float()
        losses = F.cross_entropy(logits, labels_BS.flatten(), reduction="none")
        mask = mask_BS.flatten().float()
        return ((losses * mask).sum() / mask.sum().clamp(min=1)).item()

    def drop_head(self) -> None:
        """Free the language-model head; only the states are needed from here on."""
        self._causal_lm = None

    def forward_flops(self, tokens: int, sequence_length: int) -> float:
        """FLOPs of the states of `tokens` tokens, without the head, counted as Megatron does.

        Two per matrix weight and token, and causal attention's two products over half of the
        sequence.
        """
        attention = 2 * 2 * self._attention_width * sequence_length / 2
        return tokens * (2.0 * self.matmul_parameters + attention)


def near_random(lm_loss: float, vocab_size: int) -> bool:
    """Whether a teacher predicts little better than a uniform guess: probably not loaded."""
    return lm_loss > 0.9 * math.log(vocab_size)


def _matmul_parameters(model: torch.nn.Module) -> int:
    embeddings = {
        id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Embedding)
    }
    return sum(w.numel() for w in model.parameters() if w.dim() == 2 and id(w) not in embeddings)
