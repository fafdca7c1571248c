"""What `pretrain_let.py` reads from: the command line and the model's configuration."""

import math
import os
import re
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

from megatron.core.transformer.multi_token_prediction import get_mtp_ranks
from megatron.training import get_tokenizer
from megatron.training.argument_utils import (
    core_transformer_config_from_args,
    pretrain_cfg_container_from_args,
)
from megatron.training.arguments import parse_and_validate_args, parse_args
from megatron.training.utils import get_blend_and_blend_per_split

from megatron_let.checkpoint import choice
from megatron_let.data.checked import check_ids
from megatron_let.data.inspect import first_tokens, read_sidecar
from megatron_let.data.tokenizer import tokenizer_fingerprint
from megatron_let.errors import UsageError
from megatron_let.methods.base import Method
from megatron_let.methods.schedules import schedule_samples
from megatron_let.training import arguments
from megatron_let.training.ignored_flags import refuse_ignored, refuse_unsupported
from megatron_let.training.tracking import tracker_defaults
from megatron_let.upstream.datasets import check_whole_sets, whole_set_batches
from megatron_let.upstream.mended import gpt_config, known_token_ids, refusals, token_ids

DATA_FLAGS = (
    "data_args_path per_split_data_args_path data_path train_data_path valid_data_path "
    "test_data_path"
).split()
FINITE = sys.float_info.max
BOUNDS = {
    "at least 1": (
        1,
        FINITE,
        "num_layers hidden_size ffn_hidden_size num_attention_heads num_query_groups kv_channels "
        "seq_length max_position_embeddings make_vocab_size_divisible_by vocab_size "
        "micro_batch_size global_batch_size eval_micro_batch_size "
        "tensor_model_parallel_size context_parallel_size "
        "pipeline_model_parallel_size expert_model_parallel_size expert_tensor_parallel_size "
        "exit_interval exit_duration_in_mins seed lr_decay_iters lr_decay_samples "
        "save_retain_interval distributed_timeout_minutes loss_scale_window hysteresis "
        "check_weight_hash_across_dp_replicas_interval train_sync_interval eval_global_batch_size "
        "distributed_timeout_seconds_after_init save_keep_last",
    ),
    "at least 1 step. (No evaluation: --eval-iters 0; no checkpoints: leave --save out)": (
        1,
        FINITE,
        "eval_interval log_interval save_interval tensorboard_log_interval "
        "non_persistent_save_interval",
    ),
    "0 or more": (
        0,
        FINITE,
        "train_iters train_samples eval_iters num_workers lr min_lr lr_warmup_init lr_warmup_iters "
        "lr_warmup_samples weight_decay start_weight_decay end_weight_decay adam_eps "
        "manual_gc_interval decoupled_lr decoupled_min_lr init_method_std",
    ),
    "more than 0": (sys.float_info.min, FINITE, "loss_scale initial_loss_scale min_loss_scale"),
    "0, which clips nothing, or more": (0, math.inf, "clip_grad"),
    "from 0 to 1": (
        0,
        1,
        "attention_dropout hidden_dropout adam_beta1 adam_beta2 lr_warmup_fraction rotary_percent",
    ),
}
"""What numbers must be that Megatron does not look at, or only when it is too late for words."""
LOOKED_AT = 1 << 20
"""Token ids of each dataset that are compared with the model's rows before the first step."""


def parse_arguments(tracks: bool = True) -> Namespace:
    """Parse and check the command line; sets Megatron's globals (`parse_and_validate_args`).

    With `tracks` trackers are opened, in the run's folder. Raises UsageError for a flag of ours, a
    mode of Megatron's or a path that can't be right.
    """
    if "RANK" not in os.environ:  # plain `python pretrain_let.py`: one process, any free port
        os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    refuse_unsupported(sys.argv)
    arguments.import_methods(sys.argv)
    with refusals():
        flags = parse_args(arguments.add_arguments)
    _check_numbers(flags)
    if not (flags.use_megatron_fsdp or flags.use_torch_fsdp2):
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # Megatron demands it with TP
    refuse_ignored(flags, sys.argv)
    arguments.check_flags(flags, sys.argv)
    arguments.check_groups(flags)
    choice.check_flags(flags)
    _check_data_paths(flags)
    _check_needed(flags)
    _check_tokenizer_is_given(flags)
    _check_shards(flags)
    defaults = tracker_defaults(flags) if tracks else {}
    defaults |= {"tokenizer_type": "GPT2BPETokenizer"}
    if flags.full_validation:
        defaults |= whole_set_batches(flags)
    with refusals():
        args = parse_and_validate_args(arguments.add_arguments, args_defaults=defaults)
    if args.full_validation:
        check_whole_sets(args)
    if not args.skip_train:
        _check_schedule(args)
    arguments.check_flags(args, sys.argv)  # fills in the defaults that depend on other flags
    _check_data_tokenizer(args)
    args.save_keep_every = args.save_retain_interval
    if args.save_keep_last is not None:  # then it is ours to remove checkpoints
        args.save_retain_interval = None
    return args


def _check_numbers(args: Namespace) -> None:
    for what, (least, most, names) in BOUNDS.items():
        for name in names.split():
            value = vars(args)[name]
            if value is not None and not least <= value <= most:  # nan is neither
                raise UsageError(f"{arguments.flag(name, value)} must be {what}.")
    for small, large in (
        ("min_loss_scale", "initial_loss_scale"),
        ("moe_router_topk", "num_experts"),
    ):
        value, most = vars(args)[small], vars(args)[large]
        if None not in (value, most) and value > most:
            above = f"{arguments.flag(small, value)} is above {arguments.flag(large, most)}"
            raise UsageError(f"{above}: change one of them.")
    shares = re.findall(r"[.0-9]+", args.split or "1")  # as Megatron reads them
    if len(shares) > 3 or not any(share.strip(".0") for share in shares):
        raise UsageError(
            f"--split {args.split} must be the parts of training, validation and test, such as "
            "90,9,1."
        )
    if args.non_persistent_save_interval and None in (args.non_persistent_ckpt_type, args.save):
        raise UsageError(
            f"--non-persistent-save-interval {args.non_persistent_save_interval} has no effect "
            "alone: add --non-persistent-ckpt-type global and --save, or leave it out."
        )


def _check_shards(args: Namespace) -> None:
    """Sizes that Megatron divides while it builds the model, or in the first step."""
    tp = args.tensor_model_parallel_size
    divided = ["ffn_hidden_size"] * (args.num_experts is None)
    for name in [*divided, *["seq_length"] * args.sequence_parallel]:
        if (vars(args)[name] or 0) % tp:
            given = arguments.flag(name, vars(args)[name])
            ranks = arguments.flag("tensor_model_parallel_size", tp)
            raise UsageError(f"{given} does not divide over {ranks} ranks: change one of them.")


def _check_schedule(args: Namespace) -> None:
    _, decay, warmup = schedule_samples(args)
    unit, batch = ("samples", 1) if args.train_samples else ("iters", args.global_batch_size)
    fall = vars(args)[f"lr_wsd_decay_{unit}"]
    own_least = args.decoupled_min_lr
    if own_least is None and args.decoupled_lr is not None:
        own_least = args.min_lr
    for is_wrong, what in (
        (
            warmup >= decay,
            f"The learning rate would rise for {warmup:g} samples (--lr-warmup-*), but it has "
            f"reached its end after {decay:g} (--train-*, --lr-decay-*): warm up for less.",
        ),
        (
            args.lr_warmup_init > args.lr,
            f"--lr-warmup-init {args.lr_warmup_init} is above --lr {args.lr}: begin lower.",
        ),
        (
            own_least is not None and (args.decoupled_lr or 0) < own_least,
            f"--decoupled-lr is {args.decoupled_lr} and must be at least {own_least}, its end "
            "(--decoupled-min-lr, or else --min-lr).",
        ),
        (
            (args.lr_decay_style == "WSD") != (fall is not None),
            f"--lr-decay-style WSD and --lr-wsd-decay-{unit}, its fall at the end, go together: "
            "give both, or neither.",
        ),
        (
            (fall or 0) * batch > decay,
            f"--lr-wsd-decay-{unit} {fall} is longer than the run: choose less.",
        ),
        (
            args.end_weight_decay < args.start_weight_decay,
            "Megatron-LM's weight decay only grows: let --end-weight-decay be the larger one.",
        ),
        (
            args.override_opt_param_scheduler and args.use_checkpoint_opt_param_scheduler,
            "--override-opt-param-scheduler follows this command's schedule, "
            "--use-checkpoint-opt-param-scheduler the checkpoint's: give one of them.",
        ),
    ):
        if is_wrong:
            raise UsageError(what)


def _data_prefixes(args: Namespace) -> list[str]:
    try:
        blend, per_split = get_blend_and_blend_per_split(args)
    except Exception as error:  # a damaged list can raise anything
        values = {name: vars(args)[name] for name in DATA_FLAGS if vars(args)[name] is not None}
        given = " ".join(arguments.flag(name, value) for name, value in values.items())
        why = str(error) if all(values.values()) else ""
        why = why or "give one list, with a weight before each path or before none"
        raise UsageError(f"{given} cannot be read: {why}") from error
    parts = [part for part in (blend, *(per_split or ())) if part]
    for prefixes, weights in parts:
        for prefix, weight in zip(prefixes, weights or (), strict=False):
            if not 0 < weight < math.inf:
                raise UsageError(
                    f"{prefix} has the weight {weight}: give one above 0, or leave it out."
                )
    whole = blend or (per_split or (None, None))[1]
    if args.full_validation and whole and whole[1] and len(whole[0]) > 1:
        raise UsageError(
            "--full-validation evaluates each set by itself, without weights: give the training "
            "data with theirs by --train-data-path, and the sets alone by --valid-data-path."
        )
    names = args.validation_set_names
    sets = per_split[1][0] if per_split and per_split[1] else [""]
    is_named = names and args.full_validation and len(names) == len(set(names)) == len(sets)
    if names is not None and not is_named:
        raise UsageError(
            f"--validation-set-names {' '.join(names)} must be a name of its own for each set of "
            f"--valid-data-path, of which there are {len(sets)}, with --full-validation "
            "--multiple-validation-sets."
        )
    return [prefix for prefixes, _ in parts for prefix in prefixes]


def _check_data_paths(args: Namespace) -> None:
    for prefix in _data_prefixes(args):
        if not (Path(f"{prefix}.bin").exists() and Path(f"{prefix}.idx").exists()):
            name = Path(prefix).name
            raise UsageError(
                f"No data at {prefix}: {name}.bin and {name}.idx must both exist there. Write them "
                "with megatron-let preprocess, and give their path without the ending."
            )
        try:
            start = first_tokens(prefix, 1)
        except ValueError as error:
            raise UsageError(f"The data is damaged: {error}. Write it again.") from error
        if not len(start):
            raise UsageError(f"{prefix} holds no token: leave it out.")


def _check_needed(args: Namespace) -> None:
    """Numbers that Megatron computes with although they have no default."""
    steps = args.train_samples if args.train_iters is None else args.train_iters
    for flag, meaning, value in (
        ("--train-iters", "number of training steps", steps),
        ("--lr", "peak learning rate", args.lr),
        ("--eval-interval", "steps between two evaluations", args.eval_interval),
    ):
        if value is None and not (args.skip_train and flag != "--train-iters"):
            raise UsageError(f"Add {flag}, the {meaning}: Megatron-LM has no default for it.")
    for name in ("step_batch_size_schedule", "phase_transition_iterations"):
        if vars(args)[name] is not None and args.train_samples is None:
            raise UsageError(
                f"{arguments.flag(name, vars(args)[name])} goes with --train-samples (and "
                "--lr-*-samples): Megatron-LM counts in samples there, and makes wrong ones of "
                "steps."
            )
    if args.full_validation != args.multiple_validation_sets:
        raise UsageError(
            "--full-validation and --multiple-validation-sets go together: Megatron-LM evaluates "
            "whole sets one by one, or --eval-iters batches of one blend. Give both, or neither."
        )
    if args.save is not None and args.save_interval is None:
        raise UsageError(
            f"--save {args.save} needs --save-interval, the steps between two checkpoints: add "
            f"for example --save-interval {args.train_iters or 1000}."
        )


def _check_tokenizer_is_given(args: Namespace) -> None:
    """Megatron would look on the net for what is not there."""
    files = {name: vars(args)[name] for name in ("vocab_file", "merge_file") if vars(args)[name]}
    for name, path in files.items():
        if not Path(path).is_file():
            raise UsageError(f"{arguments.flag(name, path)} is no file.")
    is_given = args.tokenizer_model or files or "Null" in (args.tokenizer_type or "")
    if not (is_given or args.use_checkpoint_args):
        raise UsageError(
            "Add the tokenizer: --tokenizer-type HuggingFaceTokenizer --tokenizer-model with its "
            "folder or hub id, or --vocab-file and --merge-file of GPT-2's."
        )


def _check_data_tokenizer(args: Namespace) -> None:
    """Refuse data that was preprocessed with another tokenizer, where its sidecar tells."""
    ids = {} if "Null" in args.tokenizer_type else token_ids(get_tokenizer())
    own = tokenizer_fingerprint(ids)
    if args.tokenizer_type == "HuggingFaceTokenizer":
        args.tokenizer_fingerprint = own  # for who exports the checkpoint
    for prefix in _data_prefixes(args):
        made_with = read_sidecar(prefix).get("tokenizer_fingerprint") if ids else None
        if made_with not in (None, own):
            raise UsageError(
                f"{prefix} was made with another tokenizer (fingerprint {str(made_with)[:12]}) "
                f"than --tokenizer-model {args.tokenizer_model or args.vocab_file} ({own[:12]}). "
                "Use that tokenizer, or preprocess again."
            )
        check_ids(first_tokens(prefix, LOOKED_AT), args.padded_vocab_size, prefix)


def model_config(args: Namespace, method: Method) -> Any:
    """Return Megatron's `GPTModelConfig` with what the method changes in it."""
    with refusals():
        config = gpt_config(args)
    method.check_tokens(known_token_ids(args))
    method.configure(config)
    return config


def pretrain_config(args: Namespace, model_config: Any) -> Any:
    """Return the container of all of Megatron's configurations."""
    with refusals():
        config = pretrain_cfg_container_from_args(args, model_config)
    # Of its last save, which a step that was left out needs, too (`LoopHooks` makes none twice).
    config.checkpoint.save_interval = math.inf
    return config


def embedding_ranks(args: Namespace) -> Any:
    """Return the function that tells Megatron which pipeline ranks hold an embedding."""
    config = core_transformer_config_from_args(args)

    def get_embedding_ranks(pp_ranks: list[int]) -> list[int]:
        tied = [] if args.untie_embeddings_and_output_weights else [pp_ranks[-1]]
        return sorted({pp_ranks[0], *get_mtp_ranks(pp_ranks, config), *tied})

    return get_embedding_ranks
