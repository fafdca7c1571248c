"""Rotary embeddings: Megatron's flags and Hugging Face's `rope_parameters`."""

from argparse import Namespace
from typing import Any

from megatron_let.errors import UsageError

LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""What Megatron's `RotaryEmbedding._apply_scaling` has built in."""
UPSTREAM_FACTOR = 8.0


def to_hugging_face(args: Namespace) -> dict[str, Any]:
    """Return `rope_parameters` of a run."""
    values = vars(args)
    base = {"rope_theta": float(args.rotary_base)}
    factor = values.get("rotary_seq_len_interpolation_factor")
    if values.get("use_rope_scaling"):
        if factor is not None:
            raise UsageError(
                f"--rotary-seq-len-interpolation-factor {factor} with --use-rope-scaling cannot be "
                "exported: Megatron applies both, Hugging Face's models scale in one way."
            )
        if "method" not in values and args.rope_scaling_factor != UPSTREAM_FACTOR:
            raise UsageError(
                f"--rope-scaling-factor {args.rope_scaling_factor}: Megatron-LM 0.19 forgets it "
                f"and trains with {UPSTREAM_FACTOR}, so this checkpoint of its does not tell."
            )
        return base | {"rope_type": "llama3", "factor": args.rope_scaling_factor} | LLAMA3
    if factor is not None:
        return base | {"rope_type": "linear", "factor": float(factor)}
    return base | {"rope_type": "default"}


def to_megatron(parameters: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a run with these `rope_parameters`, if Megatron has such."""
    theta, kind = parameters["rope_theta"], parameters["rope_type"]
    values: dict[str, Any] = {"rotary_base": _whole("rope_theta", theta)}
    if kind == "linear":
        factor = _whole("the factor of linear scaling", parameters["factor"])
        values["rotary_seq_len_interpolation_factor"] = factor
    elif kind == "llama3":
        for name, built_in in LLAMA3.items():
            if parameters[name] != built_in:
                raise UsageError(
                    f"rope_parameters with {name}={parameters[name]} cannot be converted: "
                    f"Megatron's --use-rope-scaling has {built_in} built in."
                )
        values |= {"use_rope_scaling": True, "rope_scaling_factor": parameters["factor"]}
    elif kind != "default":
        raise UsageError(f"rope_type {kind!r}: Megatron has default, linear and llama3 only.")
    return values


def older_names(parameters: dict[str, Any]) -> dict[str, Any]:
    """Return `rope_parameters` as readers older than transformers 5 look for them.

    Those know no other names, and would compute other positions without a word.
    """
    theta, kind = parameters["rope_theta"], parameters["rope_type"]
    fields: dict[str, Any] = {"rope_theta": theta}
    if (share := parameters.get("partial_rotary_factor")) is not None:  # a GPT-NeoX's
        fields |= {"rotary_emb_base": theta, "rotary_pct": share}
    if kind != "default":
        shared = ("rope_theta", "partial_rotary_factor")
        fields["rope_scaling"] = {k: v for k, v in parameters.items() if k not in shared}
    return fields


def _whole(what: str, value: float) -> int:
    if value != int(value):
        raise UsageError(f"{what} {value} cannot be converted: Megatron takes whole numbers.")
    return int(value)
