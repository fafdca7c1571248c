"""The gradient contract, run on one rank of a layout: every parameter's gradient, put together.

A case builds the student through the real command line (`entry`, `Method`, `Run`), gives every
parameter values that depend on its global name alone, runs one step over fixed micro-batches with
uneven loss masks, and returns whole gradients by global name. `reference_gradients` does the same
in float32 with the loss written out on one process: plain autograd, the teacher called directly,
without a line of `megatron_let.losses.attach` or `megatron_let.teacher.stage`.
"""

import hashlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from megatron.core import mpu
from megatron.core.distributed import finalize_model_grads
from megatron.core.enums import ModelType
from megatron.core.num_microbatches_calculator import (
    get_num_microbatches,
    update_num_microbatches,
)
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.utils import unwrap_model
from megatron.training import training
from megatron.training.argument_utils import pretrain_cfg_container_from_args

from megatron_let.losses.attach import interpolate
from megatron_let.methods.table import build_method
from megatron_let.teacher.load import load_causal_lm, read_teacher_config
from megatron_let.training import command_line
from megatron_let.training.run import Run
from megatron_let.upstream.mended import mend_megatron
from tests.distributed.faults import DISTILLATION_FAULTS, FAULTS
from tests.distributed.gathered_attention import context_parallel_attention
from tests.support.testing import forget_last_run

SEQ, MICRO_BATCH, VOCAB = 16, 2, 256  # NullTokenizer adds one token to --vocab-size
MODEL_FLAGS = (
    "--num-layers 4 --hidden-size 32 --num-attention-heads 4 --ffn-hidden-size 64 --swiglu "
    "--normalization RMSNorm --disable-bias-linear --position-embedding-type rope "
    f"--seq-length {SEQ} --max-position-embeddings {SEQ} --micro-batch-size {MICRO_BATCH} "
    "--attention-dropout 0 --hidden-dropout 0 --lr 1e-3 --clip-grad 0 "
    f"--mock-data --tokenizer-type NullTokenizer --vocab-size {VOCAB - 1} "
    "--make-vocab-size-divisible-by 8 --eval-iters 0 --eval-interval 100 "
    "--no-check-for-nan-in-loss-and-grad --cpu"
).split()

Gradients = dict[tuple[str, str], np.ndarray]


@dataclass
class Student:
    """A student as the command line builds it."""

    args: Any
    method: Any
    run: Run
    chunks: list[Any]
    loss_scale: float
    """What the gradients are multiplied by, in fp16."""


def build_student(flags: list[str], global_batch: int, rounding: torch.dtype) -> Student:
    """Build a student, its weights rounded to `rounding` whatever its own precision is."""
    forget_last_run()
    mend_megatron()
    length = [] if "--train-samples" in flags else ["--train-iters", "10"]
    grows = "--step-batch-size-schedule" in flags
    batch = [] if grows else ["--global-batch-size", str(global_batch)]
    sys.argv = ["pretrain_let.py", *MODEL_FLAGS, *length, *batch, *flags]
    args = command_line.parse_arguments()
    method = build_method(args)
    config = command_line.model_config(args, method)
    run = Run(args, config, method)
    training.initialize_megatron(get_embedding_ranks=command_line.embedding_ranks(args))
    with context_parallel_attention(args.context_parallel_size > 1):
        chunks, optimizer, _ = training.setup_model_and_optimizer(
            ModelType.encoder_or_decoder,
            cfg_container=pretrain_cfg_container_from_args(args, config),
            pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
        )
    for chunk in chunks:
        chunk.train()
        _fill(chunk, rounding)
    config.transformer.grad_scale_func = optimizer.scale_loss
    config.transformer.finalize_model_grads_func = finalize_model_grads
    args.curr_iteration = 0  # the loop's counters
    args.consumed_train_samples = 0
    return Student(args, method, run, chunks, float(optimizer.get_loss_scale()))


def layout_gradients(
    flags: list[str], global_batch: int, weights: dict[str, float], fault: str | None = None
) -> Gradients:
    """Whole gradients of one step in a layout: the language-model part, then the total.

    Keys are `("lm" | "total", global name)`. `weights` are arguments; `fault` is a key of
    `faults.FAULTS` or `faults.DISTILLATION_FAULTS` to inject.
    """
    student = build_student(flags, global_batch, _precision(flags))
    args, method = student.args, student.method
    method.load()
    method.prepare_teacher()
    if fault is not None:
        (FAULTS | DISTILLATION_FAULTS)[fault](method, student.chunks)
    gradients: Gradients = {}
    for part, values in (("lm", dict.fromkeys(weights, 0.0)), ("total", weights)):
        for signal in method.signals:
            own = {name: value for name, value in values.items() if hasattr(signal.flags, name)}
            signal.flags = replace(signal.flags, **own)
        args.curr_iteration += 1
        step(student)
        waiting = [signal.queue.targets for signal in method.signals]
        assert not any(waiting), "a target was left in the queue"
        gradients |= {(part, name): g for name, g in whole_gradients(student).items()}
    method.end_step()  # checks that every micro-batch had its loss with the teacher
    return gradients


def recorded_in_a_repeated_step(flags: list[str], global_batch: int) -> tuple[int, int]:
    """Alignment losses that a step holds which Megatron's rerun machine repeats, and micro-batches.

    On the rank that owns the layer; (0, 0) on others.
    """
    student = build_student(flags, global_batch, torch.float32)
    student.method.load()
    for _ in range(2):
        step(student)
    [signal] = student.method.signals
    if not signal.owner_chunks:
        return 0, 0
    return signal.queue.micro_batches, get_num_microbatches()


def _precision(flags: list[str]) -> torch.dtype:
    if "--bf16" in flags:
        return torch.bfloat16
    return torch.float16 if "--fp16" in flags else torch.float32


def step(student: Student) -> list[dict[str, torch.Tensor]]:
    """One forward and backward pass over the step's micro-batches, gradients synchronized."""
    update_num_microbatches(student.args.consumed_train_samples)  # as Megatron's loop does
    chunks, number = student.chunks, get_num_microbatches()
    iterators = [micro_batches(student.args, number) for _ in chunks]
    for chunk in chunks:
        chunk.zero_grad_buffer()
    return get_forward_backward_func()(
        forward_step_func=student.run.forward_step,
        data_iterator=iterators if len(chunks) > 1 else iterators[0],
        model=chunks,
        num_microbatches=number,
        seq_length=SEQ,
        micro_batch_size=MICRO_BATCH,
        forward_only=False,
    )


def micro_batch(index: int, documents: bool) -> dict[str, torch.Tensor]:
    """Micro-batch `index` of the step, with a loss mask of its own density.

    Args:
        index: counted over all data-parallel ranks.
        documents: each row holds two documents, which attention and positions keep apart.
    """
    generator = torch.Generator().manual_seed(1000 + index)
    words = torch.randint(0, VOCAB, (MICRO_BATCH, SEQ + 1), generator=generator)
    keep = 0.3 + 0.15 * (index % 4)
    mask = (torch.rand(MICRO_BATCH, SEQ, generator=generator) < keep).float()
    mask[0, 0] = 1.0
    positions = torch.arange(SEQ).repeat(MICRO_BATCH, 1)
    forbidden = torch.ones(SEQ, SEQ).tril().lt(0.5).repeat(MICRO_BATCH, 1, 1, 1)
    for row in range(MICRO_BATCH * documents):
        start = document_start(index, row)
        positions[row, start:] -= start
        forbidden[row, :, start:, :start] = True
    return {
        "tokens": words[:, :-1].contiguous(),
        "labels": words[:, 1:].contiguous(),
        "loss_mask": mask,
        "position_ids": positions,
        "attention_mask": forbidden,
    }


def document_start(index: int, row: int) -> int:
    """Where the second document of a row begins."""
    return 3 + (5 * index + 7 * row) % (SEQ - 5)


def micro_batches(args: Any, count: int) -> Iterator[dict[str, torch.Tensor]]:
    """This data-parallel rank's micro-batches; Megatron deals them out in turn."""
    size, rank = mpu.get_data_parallel_world_size(), mpu.get_data_parallel_rank()
    return (micro_batch(i * size + rank, args.reset_position_ids) for i in range(count))


# ----------------------------------------------------------------------------------------------
# From shards to whole tensors
# ----------------------------------------------------------------------------------------------


def _named_parameters(chunk: Any) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Parameters of a chunk by global name: layers carry their global number."""
    module = unwrap_model(chunk)
    numbers = {str(i): layer.layer_number for i, layer in enumerate(module.decoder.layers)}
    for name, parameter in module.named_parameters():
        parts = name.split(".")
        if parts[:2] == ["decoder", "layers"]:
            parts[2] = str(numbers[parts[2]])
        name = ".".join(parts)
        if module.share_embeddings_and_output_weights and name == "output_layer.weight":
            name = "embedding.word_embeddings.weight"  # the last stage's copy of it
        yield name, parameter


def _values(name: str, shape: list[int], rounding: torch.dtype) -> torch.Tensor:
    """A parameter's values, which depend on its name and shape alone."""
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little")
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.1
    return (1.0 + values if "norm" in name else values).to(rounding).float()


def _fill(chunk: Any, rounding: torch.dtype) -> None:
    size, rank = mpu.get_tensor_model_parallel_world_size(), mpu.get_tensor_model_parallel_rank()
    for name, parameter in _named_parameters(chunk):
        axis = parameter.partition_dim if _is_sharded(parameter) else None
        shape = list(parameter.shape)
        if axis is not None:
            shape[axis] *= size
        whole = _values(name, shape, rounding)
        if axis is not None:
            whole = _join(name, list(whole.chunk(size, axis)), axis, inverse=True).chunk(
                size, axis
            )[rank]
        with torch.no_grad():
            parameter.copy_(whole)


def _is_sharded(parameter: torch.nn.Parameter) -> bool:
    return mpu.get_tensor_model_parallel_world_size() > 1 and getattr(
        parameter, "tensor_model_parallel", False
    )


def _join(name: str, parts: list[torch.Tensor], axis: int, inverse: bool = False) -> torch.Tensor:
    """Concatenate shards; a gated MLP's shards hold [gate; up] each, the whole all gates first."""
    if "linear_fc1" not in name or len(parts) == 1:
        return torch.cat(parts, axis)
    if not inverse:
        halves = [part.chunk(2, axis) for part in parts]
        return torch.cat([half[i] for i in range(2) for half in halves], axis)
    pieces = torch.cat(parts, axis).chunk(2 * len(parts), axis)
    order = [i for rank in range(len(parts)) for i in (rank, rank + len(parts))]
    return torch.cat([pieces[i] for i in order], axis)


def whole_gradients(student: Student) -> dict[str, np.ndarray]:
    """Gather every gradient over TP; each pipeline stage returns the parameters it owns."""
    gradients = {}
    for chunk in student.chunks:
        _gather_distributed_shards(chunk)
        for name, parameter in _named_parameters(chunk):
            gradient = parameter.main_grad.detach().float() / student.loss_scale
            if _is_sharded(parameter):
                group = mpu.get_tensor_model_parallel_group()
                parts = [torch.empty_like(gradient) for _ in range(group.size())]
                torch.distributed.all_gather(parts, gradient, group=group)
                gradient = _join(name, parts, parameter.partition_dim)
            gradients[name] = gradient.numpy()
    return gradients


def _gather_distributed_shards(chunk: Any) -> None:
    """With the distributed optimizer a rank holds the reduced gradients of its shard only."""
    if not chunk.ddp_config.use_distributed_optimizer:
        return
    group = mpu.get_data_parallel_group(with_context_parallel=True)
    for buffer in chunk.buffers:
        for bucket in buffer.buckets:
            shards = list(bucket.grad_data.chunk(group.size()))
            own = shards[group.rank()].clone()
            torch.distributed.all_gather(shards, own, group=group)


# ----------------------------------------------------------------------------------------------
# The loss written out
# ----------------------------------------------------------------------------------------------


def reference_gradients(
    flags: list[str],
    global_batch: int,
    weight: float,
    layer: int,
    teacher: str,
    precision: list[str],
    resize: str,
    context_parallel: int = 1,
    loss: str = "cosine",
) -> Gradients:
    """Gradients of the two terms of `mean over micro-batches of (lm + weight * let) / tokens`.

    Keys are `("lm" | "part", global name)`. With --calculate-per-token-loss: both sums over all
    micro-batches, divided by all tokens. `flags` are the student's shape, `precision` the flag of
    the layout's, to whose values the weights are rounded. Under context parallelism Megatron takes
    the mean of each rank's part of a micro-batch for itself.
    """
    rounding = _precision(precision)
    student = build_student(flags, global_batch, rounding)
    module = unwrap_model(student.chunks[0])
    states: list[torch.Tensor] = []
    module.decoder.layers[layer - 1].register_forward_hook(lambda _, __, out: states.append(out[0]))
    base = load_causal_lm(
        read_teacher_config(teacher), torch.float32, torch.device("cpu")
    ).base_model
    parameters = dict(_named_parameters(student.chunks[0]))
    if resize == "linear":
        name = f"decoder.layers.{layer}.let_resize.weight"
        shape = [module.config.hidden_size, base.config.hidden_size]
        parameters[name] = torch.nn.Parameter(_values(name, shape, rounding))
    documents = student.args.reset_position_ids
    batches = [micro_batch(i, documents) for i in range(global_batch // MICRO_BATCH)]
    all_tokens = sum(batch["loss_mask"].sum() for batch in batches)
    lm_total, let_total = torch.zeros(()), torch.zeros(())
    for index, batch in enumerate(batches):
        losses = module(
            batch["tokens"], batch["position_ids"], batch["attention_mask"], labels=batch["labels"]
        )
        target, has_target_BS = _teacher_states(base, batch["tokens"], index, documents)
        hidden = states.pop()
        if resize == "linear":
            resized = target @ parameters[name].T
        else:
            resized = interpolate(target, hidden.size(-1))
        if loss == "cca":
            counts_SB = (batch["loss_mask"] * has_target_BS).T > 0
            alike = canonical_likeness(hidden[counts_SB], target[counts_SB])
            aligned = (1 - alike).float().expand(hidden.shape[:2])
        else:
            aligned = 1 - F.cosine_similarity(hidden, resized, dim=-1)
        for own in parts_of_a_sequence(context_parallel):
            mask = batch["loss_mask"][:, own]
            means = len(batches) * context_parallel
            per_token = "--calculate-per-token-loss" in flags
            tokens = all_tokens if per_token else mask.sum() * means
            lm_total = lm_total + (losses[:, own] * mask).sum() / tokens
            let_sum = (aligned.transpose(0, 1)[:, own] * mask * has_target_BS[:, own]).sum()
            let_total = let_total + weight * let_sum / tokens
    gradients: Gradients = {}
    for part, term in (("lm", lm_total), ("part", let_total)):
        values = torch.autograd.grad(
            term, list(parameters.values()), retain_graph=True, allow_unused=True
        )
        for (name, parameter), value in zip(parameters.items(), values, strict=True):
            value = torch.zeros_like(parameter) if value is None else value
            gradients[part, name] = value.numpy()
    return gradients


def canonical_likeness(student_NH: torch.Tensor, teacher_NT: torch.Tensor) -> torch.Tensor:
    """Mean squared canonical correlation, a thousandth of each variance added; float64."""
    sides = []
    for states in (student_NH.double(), teacher_NT.double()):
        centred = states - states.mean(dim=0)
        sides.append(centred / centred.norm(dim=0))
    student, teacher = sides
    own = [side.T @ side + 1e-3 * torch.eye(side.size(1), dtype=side.dtype) for side in sides]
    both = student.T @ teacher
    product = torch.linalg.solve(own[0], both) @ torch.linalg.solve(own[1], both.T)
    return product.trace() / min(both.shape)


def parts_of_a_sequence(ranks: int) -> list[list[int]]:
    """The positions of each context-parallel rank, one chunk from each end."""
    size = SEQ // (2 * ranks)
    chunks = [list(range(i * size, (i + 1) * size)) for i in range(2 * ranks)]
    return [chunks[rank] + chunks[2 * ranks - 1 - rank] for rank in range(ranks)]


def _teacher_states(
    base: Any, tokens_BS: torch.Tensor, index: int, documents: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """The teacher's last states `[S, B, D]`, each document read alone; who has any `[B, S]`."""
    everyone = torch.ones(tokens_BS.shape)
    if not documents:
        return base(input_ids=tokens_BS).last_hidden_state.transpose(0, 1), everyone
    rows = []
    for row, tokens_S in enumerate(tokens_BS):
        parts = tokens_S.tensor_split([document_start(index, row)])
        states = [base(input_ids=part[None]).last_hidden_state[0] for part in parts]
        rows.append(torch.cat(states))
    return torch.stack(rows, dim=1), everyone


def fault_names() -> list[str]:
    """The faults that can be injected."""
    return list(FAULTS)
