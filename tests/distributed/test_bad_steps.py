"""What is not finite: the run stops, or leaves the step out; none of it is saved."""

import math
import shutil

import pytest

from megatron_let.checkpoint.finite import FiniteCheck
from megatron_let.upstream.loop_hooks import Step
from tests.distributed.training import TP2_PP2, records, run
from tests.support.testing import run_distributed
from tests.support.tiny_run import FLAGS, STEPS, checkpoint, hashes, tensor_names

STEP, RANK = 3, 1
SKIP = "--bf16 --use-distributed-optimizer --loss-scale 1 --no-check-for-nan-in-loss-and-grad"
EXIT_CODE_RESUME_TO_DISAMBIGUATE = 16
VIRTUAL_STAGES = (
    "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1".split()
)
UNCHECKED = "--no-check-for-nan-in-loss-and-grad"


def train(
    save,
    *flags,
    world_size=2,
    what="loss",
    step=STEP,
    rank=RANK,
    value=math.nan,
    checked=True,
    interval=1,
):
    argv = [*FLAGS, "--save", str(save), "--save-interval", str(interval), *flags]
    function = "tests.distributed.bad_steps:train"
    return run_distributed(function, world_size, argv, what, step, rank, value, checked)


def ends(found):
    return [end for end, _ in found]


def errors(found):
    """The sentences that were printed, on any rank."""
    lines = [line for _, printed in found for line in printed.splitlines()]
    return [line for line in lines if line.startswith("pretrain_let.py: error: ")]


def tracked(save):
    """The step that a next start would go on from; 0 if none."""
    tracker = save / "latest_checkpointed_iteration.txt"
    return int(tracker.read_text()) if tracker.exists() else 0


# --- a loss that is no number -------------------------------------------------------------------


def test_the_step_is_left_out(corpus, tmp_path):
    found = train(tmp_path, *corpus.flags, *corpus.let(*SKIP.split()))
    assert ends(found) == [None, None]
    steps = records(tmp_path, "train")
    assert list(steps) == list(range(1, STEPS + 1))
    assert "lm loss" not in steps[STEP] and all("lm loss" in steps[i] for i in (STEP - 1, STEP + 1))
    assert {step: record["ranks"] for step, record in records(tmp_path, "skip").items()} == {
        STEP: [RANK]
    }
    before, left_out, after = (hashes(tmp_path, step) for step in (STEP - 1, STEP, STEP + 1))
    weights = [name for name in before if not name.startswith("optimizer")]
    assert [left_out[name] for name in weights] == [before[name] for name in weights]
    assert [after[name] for name in weights] != [before[name] for name in weights]


def test_the_run_stops_and_goes_on_without_the_step(corpus, tmp_path):
    flags = [*corpus.flags, *corpus.let()]
    found = train(tmp_path, *flags)
    assert ends(found) == [EXIT_CODE_RESUME_TO_DISAMBIGUATE] * 2
    said = f"> step {STEP}, rank {RANK}: found NaN in local forward loss calculation"
    assert [said in printed.splitlines() for _, printed in found] == [False, True]
    assert max(records(tmp_path, "train")) == STEP - 1

    go_on = ["--load", str(tmp_path), "--rerun-mode", "disabled", "--iterations-to-skip", str(STEP)]
    # Virtual stages have an iterator each, of which upstream's step without a model knows none.
    found = train(tmp_path, *flags, *go_on, *VIRTUAL_STAGES)
    assert ends(found) == [None, None]
    assert f"> --iterations-to-skip leaves out {STEP}" in found[0][1].splitlines()
    steps = records(tmp_path, "train")
    assert list(steps) == [step for step in range(1, STEPS + 1) if step != STEP]


def test_without_reruns_it_stops_at_once(corpus, tmp_path):
    flags = [*corpus.flags, *corpus.let("--rerun-mode", "disabled")]
    [(end, printed)] = train(tmp_path, *flags, world_size=1, rank=0)
    assert end.startswith("Rank 0, node ") and "Unexpected result nan" in end
    assert f"> step {STEP}, rank 0: found NaN" in printed


@pytest.mark.parametrize("flags", ["", SKIP], ids=["checked", "unchecked"])
def test_a_sound_run_leaves_nothing_out(corpus, tmp_path, flags):
    """The twin: nothing above comes of the flags alone."""
    save = ("--save", str(tmp_path), "--save-interval", "100")
    assert not run(2, *corpus.flags, *corpus.let(*flags.split()), *save)
    assert not records(tmp_path, "skip")
    assert all("lm loss" in record for record in records(tmp_path, "train").values())


# --- the first step of a start, which Megatron does not look at, and flags with which it never does


@pytest.mark.parametrize(
    "flags",
    [
        "",
        "--use-distributed-optimizer",
        f"{UNCHECKED} --use-distributed-optimizer",
        f"--bf16 {UNCHECKED}",
        "--bf16 --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather",
    ],
)
def test_states_of_the_teacher_in_a_first_step(corpus, tmp_path, flags):
    flags = [*corpus.flags, *corpus.let(*flags.split())]
    found = train(tmp_path, *flags, what="teacher", step=1)
    assert ends(found) == [1, 1]
    [said] = errors(found)
    assert "step 1: the norm of the gradients is nan; not finite either: let loss. " in said
    assert "--iterations-to-skip 1 " in said
    assert not list(tmp_path.glob("iter_*")) and not tracked(tmp_path)


@pytest.fixture(scope="module")
def two_steps(corpus, tmp_path_factory):
    """A run of two stages that has saved after two steps."""
    save = tmp_path_factory.mktemp("two") / "steps"
    assert not run(4, *corpus.flags, *TP2_PP2, "--exit-interval", "2", "--save", str(save))
    return save


@pytest.mark.parametrize(
    ("rank", "value"), [(0, math.nan), (1, math.nan), (2, math.inf), (3, math.nan)]
)
def test_gradients_of_any_rank_in_a_next_start(corpus, two_steps, tmp_path, rank, value):
    save = shutil.copytree(two_steps, tmp_path / "save")
    bad = {"what": "gradient", "step": 3, "rank": rank, "value": value}
    found = train(save, *corpus.flags, *TP2_PP2, "--load", str(save), world_size=4, **bad)
    assert ends(found) == [1] * 4
    assert f"step 3: the norm of the gradients is {value}. " in errors(found)[0]
    assert tracked(save) == 2
    assert records(save, "stop")[2]


@pytest.mark.parametrize("flags", [f"{UNCHECKED} --clip-grad 0", f"{UNCHECKED} --lr 0"])
def test_gradients_of_a_later_step_that_nobody_checks(corpus, tmp_path, flags):
    found = train(tmp_path, *corpus.flags, *flags.split(), what="gradient", rank=0)
    assert ends(found) == [1, 1] and len(errors(found)) == 1
    assert tracked(tmp_path) == STEP - 1


def test_the_first_step_of_a_start_is_no_exception(corpus, tmp_path):
    found = train(tmp_path, *corpus.flags, step=1)
    assert ends(found) == [1, 1]
    assert f"not finite either: the loss on rank {RANK}. " in errors(found)[0]
    assert not tracked(tmp_path)


# --- weights ------------------------------------------------------------------------------------


ASYNC = "--async-save --use-persistent-ckpt-worker --async-strategy mcore"


@pytest.mark.parametrize("flags", ["", ASYNC], ids=["sync", "async"])
def test_weights_are_looked_at_before_they_are_saved(corpus, tmp_path, flags):
    flags = [*corpus.flags, *TP2_PP2, "--eval-interval", "100", *flags.split()]
    bad = {"what": "weight", "rank": 3, "value": math.inf}
    found = train(tmp_path, *flags, world_size=4, **bad)
    assert ends(found) == [1] * 4
    assert f"step {STEP}: output_layer.weight on rank 3 is " in errors(found)[0]
    assert tracked(tmp_path) == STEP - 1
    assert not (tmp_path / f"iter_{STEP:07d}").exists()


EXPERTS = "--num-experts 2 --moe-router-topk 2"
ENDINGS = {
    "end": f"--train-iters {STEP}",
    "interval": f"--exit-interval {STEP}",
    "duration": "--exit-duration-in-mins 60",
    "SIGTERM": "--exit-signal-handler",
    "async, end": f"{ASYNC} --train-iters {STEP}",
    "async, SIGTERM": f"{ASYNC} --exit-signal-handler",
}


@pytest.mark.parametrize("ending", ENDINGS)
def test_every_way_to_save_looks_at_them(corpus, tmp_path, ending):
    flags = [*corpus.flags, *ENDINGS[ending].split(), "--eval-interval", "100"]
    found = train(tmp_path, *flags, world_size=1, what="weight", rank=0, interval=100)
    assert ends(found) == [1] and f"step {STEP}: output_layer.weight" in errors(found)[0]
    assert not tracked(tmp_path) and not list(tmp_path.glob("iter_*"))


@pytest.mark.parametrize(
    ("what", "flags", "named"),
    [
        ("frozen_weight", "", "output_layer.weight"),
        (
            "expert_weight",
            EXPERTS,
            "decoder.layers.3.mlp.experts.",
        ),
        ("main_weight", "--bf16", "the optimizer's main weight"),
        ("main_weight", "--bf16 --use-distributed-optimizer", "the optimizer's main weight"),
        ("moment", "", "the optimizer's exp_avg_sq"),
        ("moment", "--bf16 --use-distributed-optimizer", "the optimizer's exp_avg_sq"),
        ("moment", EXPERTS, "the optimizer's exp_avg_sq"),
    ],
)
def test_all_that_is_saved_is_looked_at(corpus, tmp_path, what, flags, named):
    flags = [*corpus.flags, *flags.split(), "--eval-interval", "100"]
    found = train(tmp_path, *flags, world_size=1, what=what, rank=0, value=math.inf)
    assert ends(found) == [1] and f"step {STEP}: {named}" in errors(found)[0]
    assert tracked(tmp_path) == STEP - 1


@pytest.mark.parametrize("what", ["teacher", "gradient", "weight"])
def test_without_our_checks_all_this_is_saved(corpus, tmp_path, what):
    """The twin."""
    flags = [*corpus.flags, *corpus.let("--exit-interval", "1")]
    found = train(tmp_path, *flags, world_size=1, what=what, step=1, rank=0, checked=False)
    assert ends(found) == [0] and tracked(tmp_path) == 1
    saved = checkpoint(tmp_path)
    assert not all(saved.read(name).isfinite().all() for name in tensor_names(saved))


def test_a_step_with_finite_gradients_is_not_asked_for_more():
    """No loss is read, nothing gathered: no rank waits for its device or for another rank."""
    step = Step(1, losses={}, grad_norm=0.5, learning_rate=1.0, is_skipped=False, reported=None)
    FiniteCheck(count_bad_losses=None).after_step(step)


def test_a_last_step_is_left_out_and_saved(corpus, tmp_path):
    flags = [*corpus.flags, "--save", str(tmp_path), "--save-interval", "2", "--train-iters", "4"]
    assert not run(1, *flags, "--exit-interval", "3")
    go_on = ["--load", str(tmp_path), "--iterations-to-skip", "4", "--exit-interval", "4"]
    assert not run(1, *flags, *go_on)
    assert (tmp_path / "iter_0000004" / "metadata.json").exists()
    assert list(records(tmp_path, "end")) == [4]


def test_an_exit_at_the_last_step_leaves_out_no_evaluation(corpus, tmp_path):
    flags = [*corpus.flags, "--save", str(tmp_path), "--train-iters", "2"]
    assert not run(1, *flags, "--exit-interval", "2")
    assert list(records(tmp_path, "valid")) == list(records(tmp_path, "end")) == [2]
