"""The teacher's forward pass on its pipeline stage. Shapes: B rows, S sequence, D width."""

import math
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from megatron_let.errors import UsageError
from megatron_let.teacher.load import CHOOSE
from megatron_let.teacher.recorded import Recorded
from megatron_let.teacher.work import window_ends
from megatron_let.upstream.table import Redirect, applied, instead, returns

LOUD = 1e3
"""Logits behind which a cap shows; those of a small or young model may lie far below any."""

Rows = dict[str, torch.Tensor]
"""What a teacher reads, rows first: `tokens` `[B, S]`; where documents are kept apart also
`position_ids` `[B, S]` and `attention_mask` `[B, 1, S, S]`, True where attention is forbidden."""

UNASKED = (
    Redirect(
        "transformers.masking_utils",
        "find_packed_sequence_indices",
        instead(lambda position_ids: None),
        "takes positions that begin anew for documents to keep apart, which the student does where "
        "it has a mask alone; and reads them from the device, which the host waits for",
    ),
    Redirect(
        "transformers.PreTrainedModel",
        "warn_if_padding_and_no_attention_mask",
        returns(None),
        "looks for padding in what it reads, which the host waits for",
    ),
)
"""Of transformers, during a pass."""


class Teacher:
    """A frozen Hugging Face causal language model. No module: nothing adopts its weights.

    Wanted is the output of `layer`, counted from 1, or with None of the last one after the final
    norm; later layers are dropped. Sequences beyond `context` tokens are read in windows.
    `shuffled`, a control, gives each token the states of another position of its row. `windowed` is
    what `probe.check_documents` found.
    """

    def __init__(
        self,
        causal_lm: Any,
        context: int,
        layer: int | None = None,
        shuffled: bool = False,
        windowed: bool = True,
    ) -> None:
        self.context = context
        self.parameters = sum(weight.numel() for weight in causal_lm.parameters())
        self._causal_lm = causal_lm
        self._base = text_model(causal_lm)
        # The one list of all decoder layers, whatever the architecture calls it.
        number = self._base.config.get_text_config().num_hidden_layers
        lists = (m for m in self._base.modules() if isinstance(m, torch.nn.ModuleList))
        [self._layers] = [layers for layers in lists if len(layers) == number]
        self._layer = layer
        self._shuffled = shuffled
        self._pass = Recorded(partial(forward, self._base, windowed=windowed), self._layers)

    @torch.no_grad()
    def states_BSD(self, rows: Rows) -> torch.Tensor:
        """Return the layer's states of every token.

        Raises ValueError if documents are kept apart in rows longer than the context.
        """
        states = self._pass(rows) if rows["tokens"].size(1) <= self.context else self._windows(rows)
        return _shuffle(states, rows["tokens"]) if self._shuffled else states

    def _windows(self, rows: Rows) -> torch.Tensor:
        """Read overlapping windows at once; each later one contributes its new tokens only."""
        tokens_BS = rows["tokens"]
        length = tokens_BS.size(1)
        if "attention_mask" in rows or "position_ids" in rows:
            raise ValueError(f"documents kept apart in rows of {length} > {self.context} tokens")
        ends = window_ends(length, self.context)
        windows = torch.cat([tokens_BS[:, end - self.context : end] for end in ends])
        states = self._pass({"tokens": windows}).chunk(len(ends))
        spans = zip(states, [0, *ends], ends, strict=False)
        return torch.cat([window[:, start - end :] for window, start, end in spans], dim=1)

    @torch.no_grad()
    def lm_loss(self, rows: Rows, labels_BS: torch.Tensor, mask_BS: torch.Tensor) -> float:
        """Return the mean next-token loss in nats over the tokens of the mask.

        Rows longer than the context are scored as far as it reaches.
        """
        tokens = rows["tokens"][:, : self.context]
        found = logits(self._causal_lm, tokens)
        labels = labels_BS[:, : self.context].flatten()
        losses = F.cross_entropy(found.flatten(0, 1).float(), labels, reduction="none")
        mask = mask_BS[:, : self.context].flatten().float()
        return ((losses * mask).sum() / mask.sum().clamp(min=1)).item()

    @torch.no_grad()
    def head_rows(self, first: int, number: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return weight `[number, D]` and bias of the head's rows from `first` on, zero beyond it.

        Raises UsageError if the model does more to its logits than the head's matrix does.
        """
        head = self._causal_lm.get_output_embeddings()
        self._check_head_is_linear(head)
        is_embedding = head.weight is self._causal_lm.get_input_embeddings().weight
        weight = head.weight[first : first + number]
        missing = number - len(weight)
        # A slice of the embedding costs nothing; one of a head of its own would keep it alive.
        if missing or not is_embedding:
            weight = F.pad(weight, (0, 0, 0, missing))
        bias = None if head.bias is None else F.pad(head.bias[first : first + number], (0, missing))
        return weight, bias

    def _check_head_is_linear(self, head: Any) -> None:
        tokens = torch.arange(8, device=head.weight.device)[None]
        states = forward(self._base, {"tokens": tokens})
        room = torch.finfo(states.dtype).max / 2 / states.abs().max()
        factor = (LOUD / head(states).abs().max()).clamp(max=room)
        louder = head.register_forward_pre_hook(lambda _module, inputs: (inputs[0] * factor,))
        found = logits(self._causal_lm, tokens).float()
        expected = head(states).float()
        louder.remove()
        # Where they are not finite, neither is the loss, which is told of.
        if (found - expected).abs().max() > 1e-2 * expected.abs().max():
            raise UsageError(
                f"A {self._base.config.model_type} teacher scales or caps its logits behind the "
                f"head, which distillation does not know of. {CHOOSE} Or --method let, which needs "
                "no logits."
            )

    def keep_states_only(self) -> None:
        """Free the language-model head and the layers behind the wanted one."""
        self._causal_lm = None
        if self._layer is not None:
            del self._layers[self._layer :]
            # The model goes on to its final norm; the wanted states are those before it.
            _return_states_of(self._layers[self._layer - 1], self._base)

    def forward_flops(self, tokens: int, sequence_length: int) -> float:
        """FLOPs of the states of `tokens` tokens, without the head, counted as Megatron does.

        Two per matrix weight and token, of the experts that a token meets, and causal attention's
        two products over half of the sequence. Windows read some tokens twice.
        """
        length = min(sequence_length, self.context)
        read = length * len(window_ends(sequence_length, self.context))
        tokens = tokens * read // sequence_length
        config = self._base.config.get_text_config()
        count = partial(_matrix_weights, experts=getattr(config, "num_experts_per_tok", 1))
        kept = self._layers[: self._layer]
        dropped = sum(map(count, self._layers)) - sum(map(count, kept))
        attention = 2 * 2 * sum(_attention_width(layer, config) for layer in kept) * length / 2
        return tokens * (2.0 * (count(self._base) - dropped) + attention)


def text_model(causal_lm: Any) -> Any:
    """The model without its head, and without what sees pictures."""
    is_text = causal_lm.config.get_text_config() is causal_lm.config
    found = causal_lm.base_model if is_text else causal_lm.get_decoder()
    return causal_lm.model if found is causal_lm else found  # Llama 4's is itself


def forward(base_model: Any, rows: Rows, windowed: bool = True) -> torch.Tensor:
    """The model's last states `[B, S, D]`; `windowed` if its window is to be in a mask."""
    tokens_BS = rows["tokens"]
    inputs: dict[str, Any] = {"input_ids": tokens_BS, "use_cache": False}
    if "position_ids" in rows:
        inputs["position_ids"] = rows["position_ids"]
    elif "attention_mask" in rows:  # OPT would count them from the mask
        positions = torch.arange(tokens_BS.size(1), device=tokens_BS.device)
        inputs["position_ids"] = positions.expand_as(tokens_BS)
    if "attention_mask" in rows:
        dtype = next(base_model.parameters()).dtype
        forbidden = torch.finfo(dtype).min
        masks = _masks_by_kind(base_model.config, rows["attention_mask"], windowed)
        inputs["attention_mask"] = {kind: m.to(dtype) * forbidden for kind, m in masks.items()}
        if len(masks) == 1:
            [inputs["attention_mask"]] = inputs["attention_mask"].values()
    with applied(UNASKED):
        return base_model(**inputs).last_hidden_state


def logits(causal_lm: Any, tokens_BS: torch.Tensor) -> torch.Tensor:
    """The model's `[B, S, V]`."""
    with applied(UNASKED):
        return causal_lm(input_ids=tokens_BS, use_cache=False).logits


def _masks_by_kind(config: Any, forbidden: torch.Tensor, windowed: bool) -> Rows:
    """Where attention is forbidden, by kind of layer: transformers adds no window to a mask."""
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if window is None or (kinds is not None and "sliding_attention" not in kinds):
        return {"full_attention": forbidden}
    position = torch.arange(forbidden.size(-1), device=forbidden.device)
    sliding = forbidden | (windowed & (position[:, None] - position >= window))
    return {"sliding_attention": sliding} | ({"full_attention": forbidden} if kinds else {})


def _return_states_of(layer: torch.nn.Module, base_model: torch.nn.Module) -> None:
    """Have the model return the layer's output instead of its own."""
    states: list[torch.Tensor] = []

    def remember(_module: Any, _inputs: Any, output: Any) -> None:
        states.append(output if isinstance(output, torch.Tensor) else output[0])

    def replace(_module: Any, _inputs: Any, output: Any) -> Any:
        output.last_hidden_state = states.pop()
        return output

    layer.register_forward_hook(remember)
    base_model.register_forward_hook(replace)


def _shuffle(states_BSD: torch.Tensor, tokens_BS: torch.Tensor) -> torch.Tensor:
    """Permute the positions of each row by its own dice, the same on any rank and on resume."""
    dice = torch.Generator()
    orders = [
        torch.randperm(len(row), generator=dice.manual_seed(int(row.sum()))) for row in tokens_BS
    ]
    order_BS = torch.stack(orders).to(states_BSD.device)
    return states_BSD.gather(1, order_BS[..., None].expand_as(states_BSD))


def near_random(lm_loss: float, vocab_size: int) -> bool:
    """Whether a teacher predicts little better than a uniform guess: probably not loaded."""
    return lm_loss > 0.9 * math.log(vocab_size)


def _attention_width(layer: torch.nn.Module, config: Any) -> int:
    """Of all its heads, which may be wider than the states; Gemma 4's layers differ."""
    heads = getattr(config, "num_attention_heads", 0)  # none in a Mamba
    own = (getattr(module, "head_dim", None) for module in layer.modules())
    return heads * next(filter(None, own), config.hidden_size // max(1, heads))


def _matrix_weights(model: torch.nn.Module, experts: int) -> int:
    """Weights of the matrices that a token meets: where a layer stacks `[E, ...]`, of `experts`."""
    embeddings = {
        id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Embedding)
    }
    matrices = [weight for weight in model.parameters() if id(weight) not in embeddings]
    whole = sum(weight.numel() for weight in matrices if weight.dim() == 2)
    stacks = (weight for weight in matrices if weight.dim() == 3)
    return whole + sum(min(experts, len(stack)) * stack[0].numel() for stack in stacks)
