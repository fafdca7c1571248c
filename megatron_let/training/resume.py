"""Resuming: a run goes on as it began, or the user hears why it cannot.

Megatron compares four flags with the checkpoint's and knows nothing of ours; where another one
differs it ends in a traceback, or trains another model unsaid.
"""

import os
import sys
from argparse import Namespace
from collections.abc import Iterable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

from megatron.core.num_microbatches_calculator import (
    get_current_running_global_batch_size,
    update_num_microbatches,
)

from megatron_let.checkpoint.choice import is_own
from megatron_let.checkpoint.door import Door
from megatron_let.checkpoint.folder import step_of
from megatron_let.console import say
from megatron_let.errors import UsageError
from megatron_let.methods.base import Method
from megatron_let.methods.schedules import schedule_samples
from megatron_let.methods.table import BASELINE
from megatron_let.training.arguments import InitFlags, flag, groups

REMOVED = {
    "let_resize_side": "teacher",
    "kd_temperature_side": "teacher",
    "let_stop_samples": None,
}
"""Arguments that older checkpoints hold, and the only value that this version still means."""
SHAPES = (
    "num_layers hidden_size ffn_hidden_size num_attention_heads num_query_groups kv_channels "
    "position_embedding_type normalization swiglu add_bias_linear add_qkv_bias qk_layernorm "
    "untie_embeddings_and_output_weights num_experts moe_ffn_hidden_size moe_layer_freq "
    "moe_shared_expert_intermediate_size mtp_num_layers attention_output_gate "
    "multi_latent_attention q_lora_rank kv_lora_rank qk_head_dim qk_pos_emb_head_dim v_head_dim"
).split()
"""What the weights have their shapes from; the rows of the embedding may be others."""
FUNCTION = (
    "rotary_base rotary_percent rotary_interleaved use_rope_scaling rope_scaling_factor "
    "rotary_seq_len_interpolation_factor layernorm_epsilon layernorm_zero_centered_gamma "
    "softmax_type squared_relu quick_geglu openai_gelu window_size window_attn_skip_freq "
    "no_rope_freq qk_l2_norm rope_type moe_router_topk moe_router_score_function "
    "moe_router_pre_softmax moe_router_topk_scaling_factor linear_attention_freq use_mup "
    "activation_func_clamp_value glu_linear_offset bias_gelu_fusion"
).split()
"""What the model computes besides."""
FLAG_NAMES = {
    "kd_selected": "kd_selection",
    "layernorm_epsilon": "norm_epsilon",
    "layernorm_zero_centered_gamma": "apply_layernorm_1p",
}
"""What arguments are called on the command line that are called something else there."""
NEGATIVE = {"add_bias_linear": "disable_bias_linear", "bias_gelu_fusion": "no_bias_gelu_fusion"}
"""Arguments that a flag switches off."""
OPTIMIZER = (
    "optimizer use_distributed_optimizer bf16 fp16 use_precision_aware_optimizer "
    "expert_model_parallel_size"
).split()
"""What the optimizer's state has its form from."""
SCHEDULED = (
    "lr min_lr lr_decay_style weight_decay start_weight_decay end_weight_decay "
    "weight_decay_incr_style lr_warmup_init lr_wsd_decay_style lr_wsd_decay_iters "
    "lr_wsd_decay_samples decoupled_lr decoupled_min_lr"
).split()
SAMPLES = (
    "train_iters train_samples global_batch_size lr_decay_iters lr_decay_samples lr_warmup_iters "
    "lr_warmup_samples lr_warmup_fraction"
).split()
"""What says at which sample the learning rate and the weight decay have which value."""
CHANGEABLE = (
    "reset_attention_mask reset_position_ids eod_mask_loss calculate_per_token_loss clip_grad "
    "attention_dropout hidden_dropout moe_aux_loss_coeff seed split mock_data dataloader_type"
).split()
"""What may be changed on purpose: it is said."""
OPTIMIZERS_OWN = "adam_beta1 adam_beta2 adam_eps".split()
"""What comes with its state, whatever the command line says."""

ANEW = "Resume with the checkpoint's, or start a new run, with another --save,"
FROM_THE_WEIGHTS = f"{ANEW} from the weights: --finetune."


def check_resume(door: Door, args: Namespace, method: Method, chunks: list[Any]) -> list[Any]:
    """A hook before Megatron loads, on every rank with the groups there: `chunks` stay as they are.

    Raises UsageError if there is nothing to go on from, or another run's.
    """
    door.settle(args)
    saved, chosen = door.saved_args(args), door.chosen
    if saved is not None and chosen is not None:
        method.check_checkpoint(saved)
        if not args.finetune:  # that is a run of its own, which takes the weights only
            _check_ours(args, saved, method)
            if not args.skip_train:
                _check_steps(args, saved, step_of(chosen))
                _begin_optimizer_once(args, saved)
        check_flags(args, saved)
        if not args.finetune and os.environ.get("RANK", "0") == "0":
            _tell_changes(args, saved)
    return chunks


def _check_ours(args: Namespace, saved: Namespace, method: Method) -> None:
    """Another method may go on from a checkpoint; the same one must go on with the same flags."""
    defaults = {field.name: field.default for group in groups() for field in fields(group)}
    # Older code did what is the default now.
    ours = Namespace(**defaults | vars(saved))
    if args.init_from:  # the flags of growth stay on a requeued command line
        way_out = "It goes on from its own weights. Leave it out, or start a new run with another "
        names = [field.name for field in fields(InitFlags)]
        _compare(args, ours, names, f"{way_out}--save and without --load.")
    saved_method = vars(saved).get("method", BASELINE)  # Megatron-LM's own checkpoints have none
    if saved_method != args.method:
        if os.environ.get("RANK", "0") == "0":
            say(f"> --method {args.method} goes on from a checkpoint of --method {saved_method}")
        return
    for name, kept in REMOVED.items():
        if (before := vars(saved).get(name, kept)) != kept:
            raise UsageError(
                f"The checkpoint in {args.load} was saved with {flag(name, before)}, which this "
                "version has no more. Resume with the version that saved it, or start a new run, "
                "with another --save, from the weights: --finetune."
            )
    given = {word.partition("=")[0] for word in sys.argv}
    chosen, way_out = vars(args).get("guidance") == "auto", FROM_THE_WEIGHTS
    if chosen:
        way_out += " (--guidance auto chooses by the run's length: what is given beside it counts.)"
    compared = method.same_on_resume  # a default of older code need not be this command line's
    same = [name for name in compared if chosen or name in saved or flag(name) in given]
    _compare(args, ours, same, way_out)


def check_flags(args: Namespace, saved: Namespace) -> None:
    """Compare Megatron's arguments with a checkpoint's; one that it lacks is as it is now.

    Raises UsageError, which names both values and the flag that helps.
    """
    table = ["max_position_embeddings"] * (args.position_embedding_type == "learned_absolute")
    _compare(args, saved, [*SHAPES, *table], f"{ANEW} without --load.")
    if args.finetune:
        return
    _compare(args, saved, FUNCTION, FROM_THE_WEIGHTS)
    where = f"the checkpoint in {args.load} was saved with"
    tokenizers = [vars(a).get("tokenizer_fingerprint") for a in (args, saved)]
    if None not in tokenizers and tokenizers[0] != tokenizers[1]:
        raise UsageError(
            f"--tokenizer-model {args.tokenizer_model} numbers tokens in another way than that of "
            f"{saved.tokenizer_model} did: {where} it. {FROM_THE_WEIGHTS}"
        )
    for name in ("optim", "rng"):
        if vars(saved).get(f"no_save_{name}") and not vars(args)[f"no_load_{name}"]:
            raise UsageError(f"Add --no-load-{name}: {where} --no-save-{name}.")
    if args.no_load_optim:
        return
    way_out = "Resume with the checkpoint's, or add --no-load-optim for a fresh optimizer."
    _compare(args, saved, OPTIMIZER, way_out)
    if not (args.override_opt_param_scheduler or args.use_checkpoint_opt_param_scheduler):
        samples = [name for name in SAMPLES if vars(args)[name] is not None]
        _compare(
            args,
            saved,
            SCHEDULED + samples * (schedule_samples(args) != schedule_samples(saved)),
            "Learning rate and weight decay follow a schedule over the run's samples. Add "
            "--override-opt-param-scheduler to follow this command's from here on, or "
            "--use-checkpoint-opt-param-scheduler to keep the checkpoint's.",
        )


def _check_steps(args: Namespace, saved: Namespace, step: int) -> None:
    """Megatron takes the run's steps from --train-samples as if all batches were this command's."""
    steps, samples = 0, 0
    while args.train_samples and samples < saved.consumed_train_samples:
        update_num_microbatches(samples, consistency_check=False)
        samples += get_current_running_global_batch_size()
        steps += 1
    if steps not in (0, step):
        before = vars(saved).get("step_batch_size_schedule") or f"0:{saved.global_batch_size}"
        evaluated = vars(saved).get("eval_global_batch_size") or saved.global_batch_size
        raise UsageError(
            f"The checkpoint in {args.load} has seen {samples} samples in {step} steps, which are "
            f"{steps} by this command's batches, so that --train-samples would end elsewhere. "
            "Resume with the checkpoint's batch size, or have another one from here on, by "
            f"--step-batch-size-schedule {before},{samples * args.seq_length}:SIZE "
            f"--eval-global-batch-size {evaluated} in the place of --global-batch-size."
        )


def _begin_optimizer_once(args: Namespace, saved: Namespace) -> None:
    """A job that starts again has `--no-load-optim` still, and an optimizer of its own by then."""
    if args.no_load_optim:
        args.optimizer_is_new = True  # the checkpoints' mark
    is_made = vars(saved).get("optimizer_is_new") and not vars(saved).get("no_save_optim")
    is_other = any(_differing(args, saved, OPTIMIZER))
    if args.no_load_optim and is_made and not is_other and is_own(args, Path(args.load)):
        args.no_load_optim = None
        if os.environ.get("RANK", "0") == "0":
            say("> --no-load-optim has been followed: goes on with the optimizer begun then")


def _tell_changes(args: Namespace, saved: Namespace) -> None:
    def changed(names: list[str]) -> str:
        found = _differing(args, saved, names)
        return ", ".join(f"{flag(name, now)} ({before})" for name, now, before in found)

    if others := changed(CHANGEABLE + OPTIMIZERS_OWN * bool(args.no_load_optim)):
        say(f"> goes on with other values than the checkpoint's: {others}")
    if not args.no_load_optim and (kept := changed(OPTIMIZERS_OWN)):
        say(f"> the optimizer keeps the checkpoint's values: no effect of {kept}")


def _compare(args: Namespace, saved: Namespace, names: Iterable[str], way_out: str) -> None:
    """Refuse other values than the checkpoint's."""
    for name, now, before in _differing(args, saved, names):
        raise UsageError(
            f"This run has {flag(name, now)}, the checkpoint in {args.load} was saved with "
            f"{flag(name, before)}. {way_out}"
        )


def _differing(
    args: Namespace, saved: Namespace, names: Iterable[str]
) -> Iterator[tuple[str, Any, Any]]:
    """Yield what a flag is called, its value and the checkpoint's."""
    now_args, saved_args = _as_trained(args), _as_trained(saved)
    for name in names:
        now = now_args.get(name)
        before = saved_args.get(name, now)
        if now != before:
            if name in NEGATIVE:
                name, now, before = NEGATIVE[name], not now, not before
            yield FLAG_NAMES.get(name, name), now, before


def _as_trained(args: Namespace) -> dict[str, Any]:
    """Without query groups Megatron writes the heads in their place, but at the first step only."""
    own = vars(args)
    if not own["group_query_attention"]:
        own = own | {"num_query_groups": own["num_attention_heads"]}
    return own
