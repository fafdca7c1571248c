"""One rank of a dry run: the real program for two steps, on tensors without contents."""

import contextlib
import gc
import json
import os
import sys
import time
import weakref
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron.core import mpu

from megatron_let.dry_run.flags import AS_IF, RESULT
from megatron_let.dry_run.start import Found
from megatron_let.upstream.dry import Watch, bytes_of, kernels, real, without_contents
from megatron_let.upstream.table import Redirect, alike, around, instead

STEPS = 2  # the first one makes the optimizer's state; the second one is shown
FILES = "save load pretrained_checkpoint init_from non_persistent_save_interval"
"""Arguments that name what is read or written."""
_HOST, _RUN = "megatron_let.teacher.host", "megatron_let.training.run"
_LOAD, _PROBE = "megatron_let.teacher.load", "megatron_let.teacher.probe"
_LINE, _GPT = "megatron_let.training.command_line", "megatron.core.datasets.gpt_dataset"
_DATASETS = f"{_GPT}.GPTDataset {_GPT}.MockGPTDataset"
_SCORED = "megatron_let.methods.teacher_loss"
_LOSS, _ROWS = "megatron_let.losses.distilled_cross_entropy", "megatron_let.translation"
_CHECKS = "check_weights check_states check_documents"
_UNREAD, _COUNTED = "no weights are read", "the teacher's FLOPs are counted"


class DryRank:
    """Runs a program as the rank that the environment names, and keeps what was found."""

    def __init__(self) -> None:
        self.watch = Watch()
        self.found = Found(rank=int(os.environ["RANK"]), stage=0)
        self._weights: list[weakref.ref] = []  # the teacher's, of which it lets go of some
        self._teacher_flops = 0.0

    def run(self, train: Callable[[], None]) -> None:
        """Run it, and write down what was found, whether it ends or exits."""
        began = time.monotonic()
        try:
            with without_contents(self.watch, self._redirects()):
                train()
        except SystemExit as end:  # Megatron's way to end after so many steps
            if end.code:
                raise
        self.found.seconds = time.monotonic() - began
        Path(os.environ[RESULT]).write_text(json.dumps(asdict(self.found)))

    def _redirects(self) -> list[Redirect]:
        return [
            *(kernels(self.watch) if AS_IF in sys.argv else []),
            Redirect(_LINE, "parse_arguments", _alone, "nothing is read or written"),
            Redirect(_LINE, "model_config", _local, "its own layers, once all is checked"),
            *alike(_DATASETS, "__getitem__", real, "reads"),
            Redirect(f"{_ROWS}.run", "measure", real, "reads"),
            *alike(f"{_ROWS}.rows.Translated", "__init__ __getitem__", real, "reads"),
            Redirect(_RUN, "check_loss_mask", real, "looks at the data"),
            Redirect(_LOAD, "load_causal_lm", around(self._untrained), _UNREAD),
            Redirect(_LOAD, "fingerprint", instead(lambda model: "dry run"), _UNREAD),
            *alike(_PROBE, _CHECKS, instead(lambda *args: True), _UNREAD),
            Redirect(f"{_HOST}.TeacherHost", "score", instead(_unscored), _UNREAD),
            Redirect(f"{_HOST}.Clock", "running", instead(lambda clock: self._teacher()), _COUNTED),
            # Its one product of matrices is that of the teacher's head.
            Redirect(_LOSS, "_chunk", self._teacher(), _COUNTED),
            Redirect(f"{_SCORED}.TeacherLoss", "sums", self._teacher(), _COUNTED),
            Redirect("megatron.training.training", "train_step", self._step, "no hook there"),
        ]

    def _untrained(self, load: Callable[..., Any], *args: Any, untrained: bool) -> Any:
        model = load(*args, untrained=True)
        self._weights = [weakref.ref(one) for one in model.parameters()]
        return model

    @contextlib.contextmanager
    def _teacher(self) -> Iterator[None]:
        before = self.watch.flops
        yield
        self._teacher_flops += self.watch.flops - before

    def _step(self, train_step: Callable[..., Any]) -> Callable[..., Any]:
        def step(forward: Any, data: Any, chunks: list[Any], *args: Any, **kwargs: Any) -> Any:
            gc.collect()
            found, watch = self.found, self.watch
            held, watch.peak = watch.now, watch.now
            watch.flops = self._teacher_flops = 0.0
            watch.reads = 0
            watch.collectives.clear()
            result = train_step(forward, data, chunks, *args, **kwargs)
            found.step = watch.peak - held
            found.flops, found.teacher_flops = watch.flops, self._teacher_flops
            found.reads = watch.reads
            found.collectives = [(*key, *counts) for key, counts in watch.collectives.items()]
            parameters = [one for chunk in chunks for one in chunk.parameters()]
            found.stage = mpu.get_pipeline_model_parallel_rank()
            found.parameters = sum(one.numel() for one in parameters)
            found.weights = bytes_of(parameters)
            found.gradients = bytes_of(getattr(one, "main_grad", None) for one in parameters)
            found.teacher = bytes_of(one() for one in self._weights)
            found.optimizer = held - found.weights - found.gradients - found.teacher
            return result

        return step


@around
def _alone(parse: Callable[..., Namespace]) -> Namespace:
    args = parse(tracks=False)
    args.exit_interval = STEPS
    args.train_iters = args.train_iters and max(args.train_iters, STEPS)
    for name in FILES.split():
        setattr(args, name, None)
    return args


@around
def _local(model_config: Callable[..., Any], args: Namespace, method: Any) -> Any:
    args.transformer_impl = "local"
    return model_config(args, method)


def _unscored(host: Any, train_dataset: Any) -> None:
    host.facts["lm_loss"] = 0.0
