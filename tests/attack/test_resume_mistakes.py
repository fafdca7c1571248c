"""The usual mistakes of a resumed run: each works as it is meant, or a sentence names the way out.

One trained run serves all of them; the flags are put behind its own.
"""

import json
import re
import shutil
from argparse import Namespace

import pytest
from megatron.core import num_microbatches_calculator as calculator

from megatron_let.errors import UsageError
from megatron_let.training.log import take_over
from megatron_let.training.resume import (
    _begin_optimizer_once,
    _check_steps,
    _tell_changes,
    check_flags,
)
from tests.distributed.training import run, series
from tests.support.tiny_run import checkpoint

LAST = 4
"""The checkpoint's step."""
FORMS = {
    "plain": "",
    "no optimizer": "--no-save-optim",
    "no rng": "--no-save-rng",
    "sharded": "--use-distributed-optimizer",
    "bf16": "--bf16",
}


@pytest.fixture(scope="module")
def saved(corpus, tmp_path_factory):
    """A run's first half, saved in several forms, and a function that resumes one."""
    folder = tmp_path_factory.mktemp("saved")
    for name, flags in FORMS.items():
        first = [*corpus.flags, *flags.split(), "--exit-interval", str(LAST)]
        assert not run(1, *first, "--save", str(folder / name))

    def resume(save, flags="", form="plain"):
        load = ["--load", str(folder / form), "--save", str(save)]
        return run(1, *corpus.flags, *load, *flags.split())

    return resume


REFUSED = {
    "longer run": ("--train-iters 12", "--train-iters 12, .*--train-iters 8. .*--override-opt"),
    "shorter run": ("--train-iters 6", "--train-iters 6, .*--use-checkpoint-opt-param-scheduler"),
    "batch size": ("--global-batch-size 4", "--global-batch-size 4, .*--override-opt-param-sched"),
    "learning rate": ("--lr 5e-3", r"--lr 0.005, .*--lr 0.01. .*--override-opt-param-scheduler"),
    "least learning rate": ("--min-lr 1e-4", "--min-lr 0.0001, .*--override-opt-param-scheduler"),
    "warm-up": ("--lr-warmup-iters 2", "--lr-warmup-iters 2, .*--lr-warmup-iters 0. .*--override"),
    "decay": ("--lr-decay-style cosine", "--lr-decay-style cosine, .*--override-opt-param-sched"),
    "weight decay": ("--weight-decay 0.2", "--weight-decay 0.2, .*--override-opt-param-schedul"),
    "ZeRO-1 on": ("--use-distributed-optimizer", "no --use-distributed-opt.*--no-load-optim"),
    "bf16": ("--bf16", "This run has --bf16, .*no --bf16. .*--no-load-optim"),
    "fp16": ("--fp16", "This run has --fp16, .*no --fp16. .*--no-load-optim"),
    "norm of queries": ("--qk-l2-norm", "This run has --qk-l2-norm, .*no --qk-l2-norm. .*finetune"),
    "window": ("--window-size 4,0", r"--window-size \(4, 0\), .*no --window-size. .*finetune"),
    "layers without positions": ("--no-rope-freq 2", "This run has --no-rope-freq .*finetune"),
    "warm-up's begin": ("--lr-warmup-init 1e-3", "--lr-warmup-init 0.001, .*--override-opt-par"),
    "layers": ("--num-layers 6", "--num-layers 6, .*--num-layers 4. .*without --load"),
    "width": ("--hidden-size 64", "--hidden-size 64, .*without --load"),
    "feed-forward": ("--ffn-hidden-size 96", "--ffn-hidden-size 96, .*without --load"),
    "norm": ("--normalization LayerNorm", "--normalization LayerNorm, .*--normalization RMSNorm"),
    "positions": ("--position-embedding-type learned_absolute", "learned_absolute, .* rope"),
    "experts": ("--num-experts 2", "--num-experts 2, .*no --num-experts"),
    "base of the rotation": ("--rotary-base 500000", "--rotary-base 500000, .*10000. .*--finetune"),
    "epsilon of the norms": ("--norm-epsilon 1e-6", "--norm-epsilon 1e-06, .*1e-05.*--finetune"),
    "positions made shorter": (
        "--rotary-seq-len-interpolation-factor 2",
        "--rotary-seq-len-interpolation-factor 2, .*no --rotary-seq.*--finetune",
    ),
    "part that rotates": ("--rotary-percent 0.5", "--rotary-percent 0.5, .*--finetune"),
    "tokenizer": ("--tokenizer-model OTHER", "OTHER numbers tokens in another way .*--finetune"),
    "optimizer not saved": ("", "Add --no-load-optim: .*--no-save-optim", "no optimizer"),
    "random states not saved": ("", "Add --no-load-rng: .*--no-save-rng", "no rng"),
    "ZeRO-1 off": ("", "no --use-distributed-optimizer, .*--no-load-optim", "sharded"),
    "bf16 off": ("", "This run has no --bf16, .*--bf16. .*--no-load-optim", "bf16"),
    "no evaluation interval": ("--eval-interval 0", "--eval-interval 0 .*--eval-iters 0"),
    "no log interval": ("--log-interval 0", "--log-interval 0 must be at least 1"),
    "an exit after no step": ("--exit-interval 0", "--exit-interval 0 must be at least 1"),
    "an exit at once": ("--exit-duration-in-mins 0", "--exit-duration-in-mins 0 must be at least"),
    "a step after no step": ("--train-sync-interval 0", "--train-sync-interval 0 must be at least"),
    "an evaluation of nothing": ("--eval-global-batch-size 0", "size 0 must be at least 1"),
    "no loss scale": ("--fp16 --loss-scale 0", "--loss-scale 0.0 must be more than 0"),
    "no window": ("--fp16 --loss-scale-window 0", "--loss-scale-window 0.0 must be at least 1"),
    "a least scale above the first": (
        "--fp16 --initial-loss-scale 4 --min-loss-scale 8",
        "--min-loss-scale 8.0 is above --initial-loss-scale 4.0",
    ),
    "a token for more experts than there are": (
        "--num-experts 2 --moe-router-topk 4",
        "--moe-router-topk 4 is above --num-experts 2",
    ),
    "a negative interval": ("--manual-gc --manual-gc-interval -1", "-1 must be 0 or more"),
    "no interval of hashes": (
        "--check-weight-hash-across-dp-replicas-interval 0",
        "--check-weight-hash-across-dp-replicas-interval 0 must be at least 1",
    ),
    "no save interval": ("--save-interval 0", "--save-interval 0 .*leave --save out"),
    "no validation split": ("--split 100,0,0", "--split 100,0,0 .*or add --eval-iters 0"),
}


@pytest.fixture(scope="module")
def other_tokenizer(corpus, tmp_path_factory):
    """The corpus's words, two of them with each other's numbers; its data without the sidecar."""
    folder = tmp_path_factory.mktemp("other")
    for path in corpus.folder.glob("text_text_document.*"):
        if path.suffix != ".json":
            shutil.copy(path, folder)
    shutil.copytree(corpus.folder / "tokenizer", folder / "tokenizer")
    path = folder / "tokenizer" / "tokenizer.json"
    text = path.read_text()
    assert '"w1": 1,' in text and '"w2": 2,' in text
    path.write_text(text.replace('"w1": 1,', '"w1": 2,').replace('"w2": 2,', '"w2": 1,'))
    return folder


@pytest.mark.parametrize("mistake", REFUSED)
def test_a_mistake_is_named_with_the_way_out(mistake, saved, other_tokenizer, tmp_path):
    flags, told, *form = REFUSED[mistake]
    if "OTHER" in flags:
        flags += f" --data-path {other_tokenizer}/text_text_document"
        flags = flags.replace("OTHER", f"{other_tokenizer}/tokenizer")
        told = told.replace("OTHER", f"{other_tokenizer}/tokenizer")
    error = saved(tmp_path / "save", flags, *form)
    assert error and re.search(told, error), error
    assert len(error.splitlines()) == 1
    assert not list((tmp_path).glob("save/iter_*"))


def test_other_ranks_for_the_experts_are_named(saved, tmp_path):
    """Two ranks would be needed to run it: upstream expects other entries of the optimizer."""
    assert not saved(tmp_path, f"--exit-interval {LAST + 1}")
    before = checkpoint(tmp_path).args()
    now = Namespace(**vars(before) | {"expert_model_parallel_size": 2, "no_load_optim": False})
    with pytest.raises(UsageError, match="--expert-model-parallel-size 2, .* 1. .*--no-load-optim"):
        check_flags(now, before)
    now.no_load_optim = True
    check_flags(now, before)


def test_what_may_be_changed_is_said(saved, tmp_path, capsys):
    assert not saved(tmp_path, f"--exit-interval {LAST + 1}")
    before = checkpoint(tmp_path).args()
    changes = {"clip_grad": 0.5, "reset_position_ids": True, "adam_beta2": 0.9, "finetune": False}
    now = Namespace(**vars(before) | changes | {"no_load_optim": None})
    _tell_changes(now, before)
    now.no_load_optim = True
    _tell_changes(now, before)
    told = "> goes on with other values than the checkpoint's: "
    changed = f"{told}--reset-position-ids (False), --clip-grad 0.5 (1.0)"
    kept = "> the optimizer keeps the checkpoint's values: no effect of --adam-beta2 0.9 (0.999)"
    assert capsys.readouterr().out.splitlines() == [
        changed,
        kept,
        f"{changed}, --adam-beta2 0.9 (0.999)",
    ]


@pytest.mark.parametrize(
    "flags, elsewhere, kept",
    [({}, {}, True), ({"load": "other"}, {}, False), ({"bf16": True}, {}, False)]
    + [({}, {"optimizer_is_new": False}, False), ({}, {"no_save_optim": True}, False)],
)
def test_a_job_that_starts_again_begins_its_optimizer_once(flags, elsewhere, kept):
    given = {"save": "run", "load": "run", "no_load_optim": True, "bf16": False}
    saved = {"optimizer_is_new": True, "no_save_optim": None, "bf16": False}
    now, before = given | flags, saved | elsewhere
    now, before = (Namespace(group_query_attention=True, **of) for of in (now, before))
    _begin_optimizer_once(now, before)
    assert now.no_load_optim == (None if kept else True)
    assert now.optimizer_is_new  # for the start after it


@pytest.mark.parametrize(
    "batch, schedule, steps",
    [(8, None, None), (4, None, 8), (2, "0:8,512:16", None), (2, "0:4,256:16", 5)],
)
def test_a_run_given_in_samples_takes_its_steps_by_the_same_batches(batch, schedule, steps):
    """Megatron would end it early or late: 32 of its samples were seen in 4 steps of 8."""
    before = {
        "consumed_train_samples": 32,
        "global_batch_size": 8,
        "step_batch_size_schedule": None,
    }
    now = Namespace(load="run", train_samples=64, seq_length=16)
    calculator.init_num_microbatches_calculator(0, None, batch, 2, 1, False, schedule, 16)
    try:
        _check_steps(now, Namespace(**before), LAST)
    except UsageError as error:
        assert f"which are {steps} by this command's" in str(error)
        assert "--step-batch-size-schedule 0:8,512:SIZE --eval-gl" in str(error)
    else:
        assert steps is None
    finally:
        calculator.destroy_num_microbatches_calculator()


OVERRIDE, KEEP = "--override-opt-param-scheduler", "--use-checkpoint-opt-param-scheduler"
WORKS = {
    "longer run, this schedule": (f"--train-iters 12 {OVERRIDE}", 1e-2 * 7 / 12),
    "longer run, that schedule": (f"--train-iters 12 {KEEP}", 3.75e-3),
    "learning rate, this": (f"--lr 5e-3 --min-lr 1e-3 {OVERRIDE}", 1e-3 + 4e-3 * 3 / 8),
    "learning rate, that": (f"--lr 5e-3 --min-lr 1e-3 {KEEP}", 3.75e-3),
    "batch size, that schedule": (f"--global-batch-size 4 {KEEP}", 4.375e-3),
    "optimizer not saved": ("--no-load-optim", 3.75e-3, "no optimizer"),
    "ZeRO-1 on": (
        "--use-distributed-optimizer --no-load-optim --split 100,0,0 --eval-iters 0",
        3.75e-3,
    ),
    "ZeRO-1, rate": (f"--use-distributed-optimizer --lr 5e-3 {OVERRIDE}", 1.875e-3, "sharded"),
    "bf16, rate": (f"--bf16 --lr 5e-3 {OVERRIDE}", 1.875e-3, "bf16"),
    "shapes that may differ": (
        "--seq-length 32 --max-position-embeddings 32 --make-vocab-size-divisible-by 512",
        3.75e-3,
    ),
}
"""Flags, the learning rate of the first step, the form of the checkpoint."""


@pytest.mark.parametrize("change", WORKS)
def test_a_change_works_as_it_is_meant(change, saved, tmp_path):
    flags, rate, *form = WORKS[change]
    assert not saved(tmp_path, f"{flags} --exit-interval {LAST + 1}", *form)
    assert series(tmp_path, "learning-rate")[LAST + 1] == pytest.approx(rate, rel=1e-6)


ATTEMPT = "start train train".split()


def test_a_run_in_another_folder_counts_from_its_first_step(saved, tmp_path, capfd):
    """Its data come from a worker process, which a process that was not forked could not start."""
    (tmp_path / "on").mkdir()  # a first attempt forgot --load, and was ended before it saved
    forgot = [{"kind": kind, "iteration": n, "tokens": 64 * n} for n, kind in enumerate(ATTEMPT)]
    text = "\n".join(map(json.dumps, forgot))
    (tmp_path / "on/metrics.jsonl").write_text(f'{text}\n{{"kind": "tr')
    assert not saved(tmp_path / "on", f"--exit-interval {LAST + 1} --num-workers 1")
    assert series(tmp_path / "on", "tokens") == {n: 128 * n for n in range(1, LAST + 2)}
    take_over(tmp_path / "none.jsonl", tmp_path / "new.jsonl")
    assert "none.jsonl: tokens, FLOPs and seconds are counted from" in capfd.readouterr().out
