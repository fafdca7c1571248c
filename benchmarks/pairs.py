"""Train a plain and a LET student in turns and time them; `teacher_cost.py` starts this."""

import functools
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_let.upstream import cpu  # noqa: E402

cpu.activate_if_wanted()  # before Megatron is imported, which reads torch.compile at import

import torch  # noqa: E402
from megatron.core import mpu  # noqa: E402
from megatron.core.distributed import finalize_model_grads  # noqa: E402
from megatron.core.enums import ModelType  # noqa: E402
from megatron.core.num_microbatches_calculator import get_num_microbatches  # noqa: E402
from megatron.core.pipeline_parallel import get_forward_backward_func  # noqa: E402
from megatron.core.process_groups_config import ProcessGroupCollection  # noqa: E402
from megatron.core.rerun_state_machine import RerunDataIterator  # noqa: E402
from megatron.training import training  # noqa: E402
from megatron.training.argument_utils import pretrain_cfg_container_from_args  # noqa: E402

from megatron_let.methods.base import Method  # noqa: E402
from megatron_let.methods.table import build_method  # noqa: E402
from megatron_let.teacher.stage import Rows, Teacher  # noqa: E402
from megatron_let.training import command_line  # noqa: E402
from megatron_let.training.log import count_parameters  # noqa: E402
from megatron_let.training.run import Run  # noqa: E402
from megatron_let.upstream.mended import mend_megatron  # noqa: E402

WARM_UP = 2


class Trainee:
    """A student with its optimizer, trained a step at a time as Megatron's loop does."""

    def __init__(self, args: Any, method: Method) -> None:
        self.method = method
        config = command_line.model_config(args, method)
        self.config = config.transformer
        self.run = Run(args, config, method)
        self.chunks, self.optimizer, self.scheduler = training.setup_model_and_optimizer(
            ModelType.encoder_or_decoder,
            cfg_container=pretrain_cfg_container_from_args(args, config),
            pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
        )
        for chunk in self.chunks:
            chunk.train()
        self.config.grad_scale_func = self.optimizer.scale_loss
        self.config.finalize_model_grads_func = finalize_model_grads

    def step(self, batches: Callable[[], Iterator[dict[str, torch.Tensor]]]) -> None:
        """One training step, and what the method does after it."""
        training.train_step(
            self.run.forward_step,
            RerunDataIterator(batches()),
            self.chunks,
            self.optimizer,
            self.scheduler,
            self.config,
            get_forward_backward_func(),
            iteration=0,
        )
        self.method.end_step()


def seconds(action: Callable[[], object]) -> float:
    """Time of an action that all ranks begin together, on the slowest."""
    torch.distributed.barrier()
    start = time.perf_counter()
    action()
    taken = torch.tensor(time.perf_counter() - start)
    torch.distributed.all_reduce(taken, op=torch.distributed.ReduceOp.MAX)
    return taken.item()


def random_batches(args: Any, step: int) -> Iterator[dict[str, torch.Tensor]]:
    """A step's micro-batches; as with a real loader only one tensor-parallel rank reads them."""
    generator = torch.Generator().manual_seed(step)
    shape = (args.micro_batch_size, args.seq_length + 1)
    for _ in range(get_num_microbatches()):
        words = torch.randint(0, args.padded_vocab_size - 1, shape, generator=generator)
        yield {
            "tokens": words[:, :-1].contiguous(),
            "labels": words[:, 1:].contiguous(),
            "loss_mask": torch.ones(words[:, 1:].shape),
            "position_ids": torch.arange(args.seq_length).repeat(args.micro_batch_size, 1),
        }


def count_calls() -> list[int]:
    """Count the teacher's forward passes from now on, in the list's one number."""
    calls, states_BSD = [0], Teacher.states_BSD

    def counting(self: Teacher, rows: Rows) -> torch.Tensor:
        calls[0] += 1
        return states_BSD(self, rows)

    Teacher.states_BSD = counting  # type: ignore[method-assign]
    return calls


def own_share(args: Any, step: int, at_once: int) -> list[Rows]:
    """For each teacher pass of a step, over `at_once` micro-batches, the rows of one rank."""
    tokens = [batch["tokens"] for batch in random_batches(args, step)]
    groups = [tokens[i : i + at_once] for i in range(0, len(tokens), at_once)]
    ranks = mpu.get_tensor_model_parallel_world_size()
    return [{"tokens": torch.cat(group).chunk(ranks)[0]} for group in groups]


def _run_all(teacher: Teacher, share: list[Rows]) -> None:
    for rows in share:
        teacher.states_BSD(rows)


def _measure_all(let: Trainee, args: Any) -> None:
    """What a step measures beside its losses: how the gradients compare, and what follows."""
    [signal] = let.method.signals  # type: ignore[attr-defined]
    shape = args.seq_length, args.micro_batch_size, args.hidden_size
    gradients = torch.ones(shape), torch.ones(shape)
    for _ in range(get_num_microbatches()):
        signal.queue.compare(*gradients)
    totals = [torch.ones(1) for _ in signal.recorded]
    signal.learn(*totals)
    let.method._judge(signal, torch.ones(1), totals)  # type: ignore[attr-defined]


def run_pairs(args: Any, baseline: Trainee, let: Trainee, pairs: int) -> dict[str, list[float]]:
    """Time the two students in turns, and the teacher alone as long as there is one."""
    times: dict[str, list[float]] = {"baseline": [], "let": [], "bare": [], "measures": []}
    for pair in range(-WARM_UP, pairs):
        args.curr_iteration += 1
        step = args.curr_iteration

        def train(trainee: Trainee, step: int = step) -> float:
            return seconds(lambda: trainee.step(lambda: random_batches(args, step)))

        students = {"baseline": baseline, "let": let}
        order = list(students) if pair % 2 else list(students)[::-1]
        found = {name: train(students[name]) for name in order}
        teacher = let.method.host.teacher  # type: ignore[attr-defined]
        if teacher is not None:
            share = own_share(args, step, let.method.micro_batches_at_once())
            found["bare"] = seconds(functools.partial(_run_all, teacher, share))
            found["measures"] = seconds(functools.partial(_measure_all, let, args))
        if pair >= 0:
            for name, value in found.items():
                times[name].append(value)
    return times


def main() -> None:
    """Build both students, run guided pairs and pairs after the stop, write the result."""
    mend_megatron()
    args = command_line.parse_arguments()
    method = build_method(args)
    training.initialize_megatron(get_embedding_ranks=command_line.embedding_ranks(args))
    baseline, let = Trainee(args, Method(args)), Trainee(args, method)
    method.load()
    args.curr_iteration = args.consumed_train_samples = 0
    method.start_step()
    method.prepare_teacher()
    guided = run_pairs(args, baseline, let, int(os.environ["PAIRS"]))
    args.curr_iteration = args.let_stop_step
    calls = count_calls()
    stopped = run_pairs(args, baseline, let, int(os.environ["PAIRS"]))
    student_flops = training.num_floating_point_operations(args, 1) / args.seq_length
    result = {
        "parameters": {
            "student": count_parameters(baseline.chunks),
            "teacher": method.host.facts["parameters"],
        },
        "floor": method.host.facts["flops_per_token"] / student_flops,
        "guided": guided,
        "stopped": {name: stopped[name] for name in ("baseline", "let")},
        "calls_after_stop": calls[0],
    }
    if torch.distributed.get_rank() == 0:
        Path(os.environ["RESULT"]).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
