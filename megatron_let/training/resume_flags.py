"""The flags that a resumed run must share with its checkpoint, and what helps where it doesn't.

Megatron compares four of them; another one ends in a traceback, or in another model unsaid.
"""

from argparse import Namespace
from collections.abc import Iterable
from typing import Any

from megatron_let.errors import UsageError

SHAPES = (
    "num_layers hidden_size ffn_hidden_size num_attention_heads num_query_groups kv_channels "
    "position_embedding_type normalization swiglu add_bias_linear add_qkv_bias qk_layernorm "
    "untie_embeddings_and_output_weights num_experts moe_ffn_hidden_size multi_latent_attention"
).split()
"""What the weights have their shapes from; the rows of the embedding may be others."""
FUNCTION = "rotary_base rotary_percent rotary_interleaved use_rope_scaling norm_epsilon".split()
"""What the model computes besides."""
OPTIMIZER = (
    "optimizer use_distributed_optimizer bf16 fp16 use_precision_aware_optimizer "
    "expert_model_parallel_size"
).split()
"""What the optimizer's state has its form from."""
SCHEDULED = (
    "lr min_lr lr_decay_style weight_decay start_weight_decay end_weight_decay "
    "weight_decay_incr_style"
).split()
SAMPLES = (
    "train_iters train_samples global_batch_size lr_decay_iters lr_decay_samples lr_warmup_iters "
    "lr_warmup_samples lr_warmup_fraction"
).split()
"""What says at which sample the learning rate and the weight decay have which value."""


def check_flags(args: Namespace, saved: Namespace) -> None:
    """Compare this run's arguments with a checkpoint's; one that it lacks is as it is now.

    Raises:
        UsageError: naming both values and the flag that helps.
    """
    where = f"the checkpoint in {args.load} was saved with"

    def check(names: Iterable[str], way_out: str) -> None:
        for name in names:
            now, before = vars(args).get(name), vars(saved).get(name, vars(args).get(name))
            if now != before:
                now, before = _flag(name, now), _flag(name, before)
                raise UsageError(f"This run has {now}, {where} {before}. {way_out}")

    anew = "Resume with the checkpoint's, or start a new run, with another --save, "
    check(SHAPES, f"{anew}without --load.")
    if args.finetune:  # a run of its own, which takes the weights only
        return
    check(FUNCTION, f"{anew}from the weights: --finetune.")
    tokenizers = [vars(a).get("tokenizer_fingerprint") for a in (args, saved)]
    if None not in tokenizers and tokenizers[0] != tokenizers[1]:
        raise UsageError(
            f"--tokenizer-model {args.tokenizer_model} numbers tokens in another way than that of "
            f"{saved.tokenizer_model} did: {where} it. {anew}from the weights: --finetune."
        )
    for name in ("optim", "rng"):
        if vars(saved).get(f"no_save_{name}") and not vars(args)[f"no_load_{name}"]:
            raise UsageError(f"Add --no-load-{name}: {where} --no-save-{name}.")
    if args.no_load_optim:
        return
    check(OPTIMIZER, "Resume with the checkpoint's, or add --no-load-optim for a fresh optimizer.")
    if not (args.override_opt_param_scheduler or args.use_checkpoint_opt_param_scheduler):
        samples = [name for name in SAMPLES if vars(args)[name] is not None]
        check(
            SCHEDULED + samples * (_samples(args) != _samples(saved)),
            "Learning rate and weight decay follow a schedule over the run's samples. Add "
            "--override-opt-param-scheduler to follow this command's from here on, or "
            "--use-checkpoint-opt-param-scheduler to keep the checkpoint's.",
        )


def _samples(args: Namespace) -> list[Any]:
    """The samples of the whole run, of the decay and of the warm-up, as Megatron counts them."""
    batch = args.global_batch_size or 1
    total = args.train_samples or (args.train_iters or 0) * batch
    decay = args.lr_decay_samples or (args.lr_decay_iters or 0) * batch or total
    warmup = args.lr_warmup_samples or (args.lr_warmup_iters or 0) * batch
    return [total, decay, args.lr_warmup_fraction and args.lr_warmup_fraction * decay or warmup]


def _flag(name: str, value: object) -> str:
    if name == "add_bias_linear":
        name, value = "disable_bias_linear", not value
    flag = f"--{name.replace('_', '-')}"
    if value is None or value is False:
        return f"no {flag}"
    return flag if value is True else f"{flag} {value}"
