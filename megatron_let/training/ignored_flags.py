"""Flags that Megatron has and that do nothing here: each is refused, with what helps instead."""

from argparse import Namespace

from megatron_let.errors import UsageError
from megatron_let.upstream import cpu

# Names, or with a dash at the end what names begin with.
IGNORED = {
    "rampup-batch-size": "Use --step-batch-size-schedule, pairs of tokens and batch size such as "
    "0:256,1B:512.",
    "openai-gelu": "Leave it out: with biases GELU is computed in that form (tanh), and with "
    "--no-bias-gelu-fusion in the exact one.",
    "use-flash-attn": "Use --attention-backend flash.",
    "checkpoint-activations": "Use --recompute-granularity.",
    "inprocess-": "A run is started again by torchrun or Slurm (docs/reliability.md).",
    "log-straggler straggler- disable-straggler-on-startup": "Use --timing-log-level 2 "
    "--timing-log-option all for each rank's times (docs/reliability.md).",
    "enable-ft-package calc-ft-timeouts ft-num-warmup-iters adlr- fault-injector-": "It belongs to "
    "tools of NVIDIA's clusters; use --distributed-timeout-minutes and --exit-signal-handler "
    "(docs/reliability.md).",
    "non-persistent-local- replication replication-": "Checkpoints on a node's own disk need "
    "nvidia_resiliency_ext and are not tested; use --save on a shared disk (docs/reliability.md).",
    "bert- biencoder- block-data-path classes-fraction data-per-class-fraction dino- grpo- "
    "embedding-path evidence-data-path head-lr-mult ict- img- indexer- inference- iter-per-epoch "
    "mask-factor mask-prob mask-type max-tokens-to-oom nccl-all-reduce-for-prefill num-channels "
    "num-classes langrl- onnx-safe output-bert-embeddings patch-dim query-in-block-prob retriever- "
    "rl- short-seq-prob swin- titles-data-path use-legacy-static-engine use-one-sent-docs vision- "
    "vocab-extra-ids logits- fim-": "It belongs to another of Megatron-LM's programs.",
    "apply-residual-connection-post-layernorm config-logger-dir dist-ckpt-save-pre-mcore-014 "
    "dist-ckpt-strictness exit-signal-handler-for-dataloader init-method-xavier-uniform": "Megatron"
    "-Core 0.19 has no working code for it.",
}
UNSUPPORTED = (
    "sft fim-data logits-load-dir logits-save-dir hybrid-context-parallel perform-rl-step "
    "dataloader-inter-document-masking yaml-cfg enable-msc"
)
"""Batches of another form, the file that replaces the command line, files that lie in no folder."""
OF_A_CHECKPOINT = (
    "ckpt-step override-ckpt-iteration finetune load-optim load-rng exit-on-missing-checkpoint"
)
OF_PARTIAL_SETS = "eval-iters eval-global-batch-size test-data-path"
NEEDS_TRANSFORMER_ENGINE = "fp8- fp4- save-dgrads-interval save-activations-interval"
NEEDS_GPU = (
    "record-memory-history memory-snapshot-path log-memory-to-tensorboard log-device-memory-used "
    "log-energy enable-cuda-graph external-cuda-graph gpu-sniff-test-interval use-nccl-ub "
    "nvtx-ranges apply-layernorm-1p"
)


def refuse_unsupported(argv: list[str]) -> None:
    """Look for modes of `pretrain_gpt.py` that are none here, before Megatron follows them."""
    what = (
        "is not supported: pretrain_let.py trains on documents packed to sequences, with its flags "
        "on the command line and its files in folders. Use Megatron-LM's pretrain_gpt.py for it."
    )
    _refuse(argv, UNSUPPORTED, what)


def refuse_ignored(args: Namespace, argv: list[str]) -> None:
    """Look for flags without effect; raises UsageError, which names one and what helps."""
    idle = {names: f"here. {way_out}" for names, way_out in IGNORED.items()}
    if args.non_persistent_ckpt_type == "local":
        way_out = IGNORED["non-persistent-local- replication replication-"]
        idle["non-persistent-ckpt-type"] = f"with local. {way_out}"
    if args.async_save and not (args.use_persistent_ckpt_worker and args.async_strategy == "mcore"):
        way_out = "Add --use-persistent-ckpt-worker --async-strategy mcore, which is tested."
        idle["async-save"] = f"alone. {way_out}"
    if not args.group_query_attention:
        idle["num-query-groups"] = "without --group-query-attention. Add it, or leave it out."
    if args.dataloader_type == "external":
        idle["dataloader-type"] = "with external: the data come from files."
    if args.full_validation:
        which = "evaluates the validation sets, whole, by --eval-micro-batch-size rows a rank, and"
        idle[OF_PARTIAL_SETS] = f"with --full-validation, which {which} no other. Leave it out."
    if not (args.load or args.pretrained_checkpoint):
        why = "without --load: the run would start from random weights."
        idle[OF_A_CHECKPOINT] = f"{why} Add the folder, or leave it out."
    if not args.wandb_project:
        idle["wandb-"] = "without --wandb-project. Add it, or leave it out."
    if args.transformer_impl != "transformer_engine":
        way_out = "Install it (docs/install.md), or leave the flag out."
        idle[NEEDS_TRANSFORMER_ENGINE] = f"without Transformer Engine. {way_out}"
    if args.rerun_mode == "report_stats":
        idle["rerun-mode"] = "with report_stats: Megatron-Core 0.19 has no working code for it."
    if cpu.is_active():
        idle[NEEDS_GPU] = "without a GPU. Leave it out."
        if not args.use_pytorch_profiler:
            idle["profile"] = "without a GPU but with --use-pytorch-profiler. Add it."
    for names, why in idle.items():
        _refuse(argv, names, f"has no effect {why}")


def _refuse(argv: list[str], names: str, what: str) -> None:
    for flag in (word.split("=")[0] for word in argv if word.startswith("--")):
        name = flag.removeprefix("--").removeprefix("no-")
        if any(name.startswith(n) if n.endswith("-") else name == n for n in names.split()):
            raise UsageError(f"{flag} {what}")
