"""A run that is stopped and resumed ends in the weights of one that is not, bit for bit."""

import re
import resource
import shutil
from pathlib import Path

import pytest

from tests.attack.poison import read_metadata
from tests.chaos.compare import differing
from tests.distributed.training import TP2_PP2, records, run, series
from tests.support.disk import REASON, can_mount, small_disk
from tests.support.testing import run_distributed, run_program
from tests.support.tiny_run import BATCH, FLAGS, SEQ, STEPS, checkpoint, hashes

PROGRAM = str(Path(__file__).resolve().parents[2] / "pretrain_let.py")

STOP = 4  # of `tiny_run.LET`
KINDS = {
    # Dropout depends on the random state, a weight decay that grows on the scheduler's.
    "dropout": "--attention-dropout 0.1 --hidden-dropout 0.1 --start-weight-decay 0.01 "
    "--end-weight-decay 0.3 --weight-decay-incr-style linear",
    # From the second save on the metadata are those of the first, with what is new.
    "linear_bf16": "--let-resize linear --let-weight-rule ratio --bf16 --use-distributed-optimizer "
    "--ckpt-assume-constant-structure",
}
EVERY_2 = ("--save-interval", "2")


@pytest.fixture(scope="session")
def whole(corpus, tmp_path_factory):
    """Uninterrupted runs, which save every second step."""
    folder = tmp_path_factory.mktemp("whole")
    for kind, flags in KINDS.items():
        save = str(folder / kind)
        assert not run(1, *corpus.flags, *corpus.let(*flags.split()), "--save", save, *EVERY_2)
    return folder


def resume(corpus, load, save, step, *flags, method=None):
    """Go on from one of the checkpoints of a run, as after a kill; return the usage error."""
    method = corpus.let() if method is None else method
    folders = ("--load", str(load), "--ckpt-step", str(step), "--save", str(save))
    return run(1, *corpus.flags, *method, *flags, *folders)


GPT2 = (
    "--num-layers 2 --hidden-size 32 --num-attention-heads 4 "
    "--attention-dropout 0 --hidden-dropout 0 "
    f"--seq-length {SEQ} --max-position-embeddings {SEQ} --make-vocab-size-divisible-by 8 "
    f"--micro-batch-size 2 --global-batch-size {BATCH} --lr 1e-2 --eval-iters 0 --eval-interval 9 "
    "--log-interval 1 --num-workers 0 --cpu"
).split()


OF_DEFAULTS = [
    "--train-iters 4",
    f"--train-samples {4 * BATCH}",
    "--train-iters 4 --optimizer sgd",
    "--train-iters 4 --optimizer sgd --sgd-momentum 0 --bf16",
    # The first steps are skipped: their loss scale is too large.
    "--train-iters 4 --fp16",
    "--train-iters 4 --fp16 --use-distributed-optimizer",
]


@pytest.mark.parametrize("kind", OF_DEFAULTS)
def test_the_shape_of_megatron_s_defaults_goes_on(corpus, tmp_path, kind):
    """Training itself changes some of the arguments that a checkpoint holds."""
    flags = [*GPT2, *corpus.flags, *kind.split(), *EVERY_2]
    whole, resumed = str(tmp_path / "whole"), str(tmp_path / "resumed")
    starts = ["--save", whole], ["--load", whole, "--ckpt-step", "2", "--save", resumed]
    for folders in starts:
        arguments = [*flags, *folders]
        assert run_distributed("tests.distributed.training:train", 1, arguments) == [None]
    assert hashes(tmp_path / "resumed") == hashes(tmp_path / "whole")


@pytest.mark.parametrize("step", [2, 4, 6], ids=["before_stop", "at_stop", "after_stop"])
@pytest.mark.parametrize("kind", KINDS)
def test_resumed_run_ends_like_the_uninterrupted_one(corpus, whole, tmp_path, kind, step):
    if step >= STOP:  # then the teacher's weights are not even there
        ignore = shutil.ignore_patterns("model.safetensors")
        shutil.copytree(corpus.folder / "teacher", tmp_path / "teacher", ignore=ignore)
        teacher = ("--teacher-model", str(tmp_path / "teacher"))
    else:
        teacher = ()
    save = tmp_path / "resumed"
    assert not resume(corpus, whole / kind, save, step, *KINDS[kind].split(), *teacher)

    expected = hashes(whole / kind)
    assert len(expected) >= 27  # 9 weights and two moments of each
    assert hashes(save) == expected
    for key in ("lm loss", "let loss", "let weight", "learning-rate"):
        assert series(save, key) == series(whole / kind, key), key  # what came before is taken over
    assert set(series(whole / kind, "let loss")) == {1, 2, 3, 4}
    of_the_command = {"args.ckpt_step", "args.save_interval", "args.teacher_model"}
    assert set(differing(save, whole / kind)) <= of_the_command
    assert checkpoint(save).args().consumed_train_samples == STEPS * 8
    assert (records(save, "start")[step]["teacher"] is None) == (step >= STOP)


def test_uninterrupted_runs_differ_with_the_seed(corpus, whole, tmp_path):
    """The twin: what is compared above does depend on the random state."""
    flags = (*KINDS["dropout"].split(), "--seed", "4321")
    assert not resume(corpus, whole / "dropout", tmp_path, 6, *flags, "--no-load-rng")
    assert series(tmp_path, "lm loss")[7] != series(whole / "dropout", "lm loss")[7]


def test_sigterm_saves_the_step_it_came_in(corpus, tmp_path):
    endless = "--train-iters 10000 --let-stop-step 10000 --hidden-dropout 0.1".split()
    flags = [*corpus.flags, *corpus.let(*endless)]
    save = tmp_path / "ended"
    argv = [*FLAGS, *flags, "--save", str(save)]
    function = "tests.distributed.training:train_until_sigterm"
    assert run_distributed(function, 1, argv, save / "metrics.jsonl") == [None]
    last = max(series(save, "let loss"))
    assert not run(1, *flags, "--save", str(tmp_path / "whole"), "--exit-interval", str(last))
    assert hashes(save) == hashes(tmp_path / "whole", last)

    again = ["--load", str(save), "--save", str(save), "--exit-interval", "1"]
    assert not run(1, *flags, *again)
    assert set(series(save, "let loss")) == set(range(1, last + 2))
    first, second = (records(save, "start")[step] for step in (0, last))
    assert second["tokens"] == records(save, "train")[last]["tokens"] > first["tokens"] == 0


# --- guidance that ends itself ------------------------------------------------------------------


def ends_itself(corpus, method="let+salt"):
    stop = "--kd-stop-step 8 " * (method == "let+salt")
    guided = f"--method {method} {stop}--teacher-model {corpus.folder}/teacher"
    rule = "--guidance-stop loss --guidance-margin 9 --guidance-patience 2 --guidance-ramp 3"
    let = "--let-layer 2 --let-weight 1 --let-decay constant --let-weight-rule ratio"
    return [*f"{guided} {rule} {let}".split(), "--save-interval", "1"]


@pytest.fixture(scope="session")
def ended(corpus, tmp_path_factory):
    """A run whose guidance ends after 3 of 8 steps, within 3."""
    folder = tmp_path_factory.mktemp("ended")
    assert not run(1, *corpus.flags, *ends_itself(corpus), "--save", str(folder))
    return folder


def test_it_falls_by_a_ramp_and_the_teacher_is_released(ended):
    weights = series(ended, "kd weight")
    falling = {4: 0.667 * 2 / 3, 5: 0.667 / 3}
    assert weights == pytest.approx(dict.fromkeys((1, 2, 3), 0.667) | falling)
    assert (
        series(ended, "let loss").keys() == series(ended, "teacher loss").keys() == weights.keys()
    )


@pytest.mark.parametrize("step", [1, 3, 4, 7])  # in the warm-up, before, inside, behind the ramp
def test_it_resumes_bit_for_bit(corpus, ended, tmp_path, step):
    assert not resume(corpus, ended, tmp_path, step, method=ends_itself(corpus))
    assert hashes(tmp_path) == hashes(ended)


def test_let_alone_resumes_bit_for_bit_between_two_measurements(corpus, tmp_path):
    let = ends_itself(corpus, "let")
    assert not run(1, *corpus.flags, *let, "--save", str(tmp_path / "whole"))
    weights = series(tmp_path / "whole", "let weight")
    assert 1 <= max(weights) < STEPS, "it ended by its rule"
    assert not resume(corpus, tmp_path / "whole", tmp_path / "again", 4, method=let)
    assert hashes(tmp_path / "again") == hashes(tmp_path / "whole")


# --- after the stop, without the teacher -------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_baseline_finishes_a_run_whose_guidance_is_over(corpus, whole, tmp_path, kind):
    flags = re.sub(r"--let-\S+ \S+", "", KINDS[kind]).split()
    assert not resume(corpus, whole / kind, tmp_path, 4, *flags, method=[])
    expected = hashes(whole / kind)
    learned_map = {name for name in expected if "let_resize" in name}
    assert bool(learned_map) == (kind == "linear_bf16")
    assert hashes(tmp_path) == {n: h for n, h in expected.items() if n not in learned_map}


def test_a_missing_teacher_is_named_with_the_way_out(corpus, whole, tmp_path):
    gone = ("--teacher-model", str(tmp_path / "gone"))
    flags = KINDS["dropout"].split()
    error = resume(corpus, whole / "dropout", tmp_path / "save", 6, *flags, *gone)
    assert str(tmp_path / "gone") in error
    assert "goes on without a teacher: --method baseline" in error


# --- what a resumed run must share with its checkpoint -----------------------------------------


@pytest.mark.parametrize(
    ("flags", "values"),
    [
        ("--let-layer 3", ("--let-layer 3", "--let-layer 2")),
        ("--let-stop-step 6", ("--let-stop-step 6", "--let-stop-step 4")),
        ("--let-weight 2", ("--let-weight 2.0", "--let-weight 1.0")),
        ("--let-resize linear", ("holds no learned map", "--let-resize linear")),
    ],
)
def test_another_guidance_is_refused(corpus, whole, tmp_path, flags, values):
    error = resume(corpus, whole / "dropout", tmp_path, 2, *flags.split())
    assert all(value in error for value in values), error
    assert not (tmp_path / "metrics.jsonl").exists()


def test_another_teacher_is_refused(corpus, whole, tmp_path):
    before = checkpoint(whole / "dropout").args().teacher_fingerprint
    flags = (*KINDS["dropout"].split(), "--teacher-model", f"{corpus.folder}/other")
    error = resume(corpus, whole / "dropout", tmp_path, 2, *flags)
    assert f"but {before} guided the run" in error
    assert str(whole / "dropout") in error and "--finetune" in error
    assert not (tmp_path / "metrics.jsonl").exists()


def test_finetune_takes_the_weights_with_another_guidance(corpus, whole, tmp_path):
    flags = ("--teacher-model", f"{corpus.folder}/other", "--let-layer", "3")
    short = ("--finetune", "--exit-interval", "1")
    assert not resume(corpus, whole / "dropout", tmp_path, 2, *flags, *short)
    assert set(series(tmp_path, "let loss")) == {1}
    before, after = checkpoint(whole / "dropout").args(), checkpoint(tmp_path).args()
    assert after.teacher_fingerprint != before.teacher_fingerprint


def flip(folder):
    """Turn one bit of the newest data file."""
    path = max(folder.glob("*.distcp"), key=lambda file: file.stat().st_size)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(folder):
    path = max(folder.glob("*.distcp"), key=lambda file: file.stat().st_size)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


PARALLEL_LOAD = ["--use-distributed-optimizer", "--ckpt-fully-parallel-load"]
LAYOUTS = {"1": (1, []), "tp2_pp2": (4, TP2_PP2), "parallel_load": (2, PARALLEL_LOAD)}
SUMS = [*EVERY_2, "--verify-integrity"]


@pytest.fixture(scope="module", params=["1", "tp2_pp2"])
def undamaged(request, corpus, tmp_path_factory):
    """A layout, and a folder with a whole run in it and one that ends at step 6."""
    world_size, layout = LAYOUTS[request.param]
    folder = tmp_path_factory.mktemp("undamaged")
    flags = [*corpus.flags, *corpus.let(), *layout, *SUMS]
    assert not run(world_size, *flags, "--save", str(folder / "whole"))
    assert not run(world_size, *flags, "--save", str(folder / "run"), "--exit-interval", "6")
    return world_size, flags, folder


@pytest.mark.parametrize("damage", [flip, cut], ids=["flipped", "cut"])
def test_a_damaged_checkpoint_costs_one_more_interval(undamaged, tmp_path, damage):
    world_size, flags, folder = undamaged
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    damage(tmp_path / "run" / "iter_0000006")
    folders = ["--save", str(tmp_path / "run"), "--load", str(tmp_path / "run")]
    assert not run(world_size, *flags, *folders)
    assert min(i for i in records(tmp_path / "run", "start") if i) == 4
    assert (tmp_path / "run" / "damaged_iter_0000006").is_dir()
    assert hashes(tmp_path / "run") == hashes(tmp_path / "whole")

    elsewhere = ["--load", str(tmp_path / "whole"), "--save", str(tmp_path / "other")]
    damage(tmp_path / "whole" / "iter_0000008")
    error = run(world_size, *flags, *elsewhere)
    assert "is damaged" in error and "--ckpt-step" in error


def entry(folder, name):
    """File, offset and length of the first entry of a tensor or object, in a test's own files."""
    metadata = read_metadata(folder)
    stored = next(s for index, s in metadata.storage_data.items() if index.fqn.startswith(name))
    return folder / stored.relative_path, stored.offset, stored.length


def overwrite(path, offset, content):
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(content)


def shifted(folder):
    """Some bytes in the middle are gone, the size is right."""
    path, offset, length = entry(folder, "decoder.layers.mlp.linear_fc2.weight")
    content = path.read_bytes()
    path.write_bytes(content[: offset + 99] + content[offset + 199 :] + bytes(100))


def garbage(folder):
    path, offset, length = entry(folder, "decoder.layers.mlp.linear_fc1.weight")
    overwrite(path, offset, b"garbage " * (length // 8))


def truncated(folder):
    """An entry that is no tensor ends half way."""
    path, offset, length = entry(folder, "rng_state")
    overwrite(path, offset + length // 2, bytes(length - length // 2))


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("tp2_pp2", "parallel_load")]


@pytest.mark.parametrize("damage", [shifted, garbage, truncated])
@pytest.mark.parametrize("undamaged", ["1", *SLOW], indirect=True)
def test_damage_that_only_the_load_finds(undamaged, tmp_path, damage):
    """Some ranks find it; all go on from the checkpoint before, in the same start."""
    world_size, flags, folder = undamaged
    save = tmp_path / "run"
    shutil.copytree(folder / "run", save)
    newest = save / "iter_0000006"
    (newest / "integrity.json").unlink()
    damage(newest)
    assert not run(world_size, *flags, "--save", str(save), "--load", str(save))
    assert min(i for i in records(save, "start") if i) == 4
    assert (save / "damaged_iter_0000006").is_dir()
    assert hashes(save) == hashes(folder / "whole")


@pytest.mark.parametrize("undamaged", ["1"], indirect=True)
def test_where_nothing_older_is_whole_nothing_is_renamed(undamaged, tmp_path):
    _, flags, folder = undamaged
    save = tmp_path / "run"
    for step in (4, 6):
        shutil.copytree(folder / "run" / f"iter_{step:07d}", save / f"iter_{step:07d}")
        (save / f"iter_{step:07d}" / "integrity.json").unlink()
        garbage(save / f"iter_{step:07d}")
    error = run(1, *flags, "--save", str(save), "--load", str(save))
    assert "holds no whole checkpoint (iter_0000006: decoder.layers.mlp.linear_fc1" in error
    assert not list(save.glob("damaged_*"))


@pytest.mark.parametrize("undamaged", ["1"], indirect=True)
@pytest.mark.parametrize("failure", ["shape", "disk", "memory", "allocator", "device"])
def test_what_is_no_damage_is_not_taken_for_it(undamaged, tmp_path, failure):
    _, flags, folder = undamaged
    save = tmp_path / "run"
    shutil.copytree(folder / "run", save)
    argv = [*FLAGS, *flags, "--save", str(save), "--load", str(save)]
    if failure == "shape":
        argv += ["--ffn-hidden-size", "128"]
        [error] = run_distributed("tests.attack.runs:train", 1, argv)
        assert "--ffn-hidden-size 64" in error, error
    else:
        [error] = run_distributed("tests.attack.runs:train_where_reading_fails", 1, argv, failure)
        assert failure in error and "holds no whole checkpoint" not in error, error
    assert (save / "iter_0000006").is_dir() and not list(save.glob("damaged_*"))


def test_a_full_disk_is_named_and_older_checkpoints_stay(corpus, tmp_path):
    save = ["--save", str(tmp_path / "run")]
    flags = [*corpus.flags, *corpus.let(), *EVERY_2]
    assert not run(1, *flags, *save, "--exit-interval", "4")
    before = hashes(tmp_path / "run", 4)
    argv = [*FLAGS, *flags, *save, "--load", str(tmp_path / "run")]
    function = "tests.distributed.training:train_on_a_full_disk"
    [reason] = run_distributed(function, 1, argv, 100_000)
    assert f"could not be written to {tmp_path / 'run'}" in reason
    assert "earlier checkpoints are as they were" in reason and len(reason.splitlines()) == 1
    assert hashes(tmp_path / "run", 4) == before
    assert not run(1, *flags, *save, "--load", str(tmp_path / "run"))
    assert min(i for i in records(tmp_path / "run", "start") if i) == 4


@pytest.mark.skipif(not can_mount(), reason=REASON)
@pytest.mark.parametrize("room", [300_000, 1_600_000], ids=["first", "second"])
def test_a_full_file_system_is_named(corpus, tmp_path, room):
    """No limit of the process: the disk itself, in a run's first save or its second."""
    save = tmp_path / "run"
    save.mkdir()
    flags = [*corpus.flags, *EVERY_2, "--tensorboard-dir", str(tmp_path), "--save", str(save)]
    with small_disk(save, room) as make_room:
        function = "tests.distributed.training:train_on_a_full_disk"
        [reason] = run_distributed(function, 1, [*FLAGS, *flags], resource.RLIM_INFINITY)
        assert f"could not be written to {save}" in reason and "make room" in reason
        tracker = save / "latest_checkpointed_iteration.txt"
        went_on_from = int(tracker.read_text()) if tracker.exists() else 0
        assert went_on_from == (2 if room > 1_000_000 else 0)
        make_room()
        assert not run(1, *flags, "--load", str(save))
        assert sorted(records(save, "start"))[-1] == went_on_from
        assert tracker.read_text() == str(STEPS)


def test_totals_count_steps_that_were_not_logged(corpus, tmp_path):
    """The run is killed after the save of step 3 of a log interval of 4."""
    flags = [*corpus.flags, "--log-interval", "4", "--save", str(tmp_path), "--save-interval", "3"]
    assert not run(1, *flags, "--exit-interval", "3")
    log = tmp_path / "metrics.jsonl"
    log.write_text("".join(line for line in log.open() if '"stop"' not in line))
    assert not run(1, *flags, "--load", str(tmp_path))
    tokens = series(tmp_path, "tokens")
    assert tokens == {step: step * BATCH * SEQ for step in (4, 8)}


def test_another_order_of_the_samples_is_said(corpus, tmp_path):
    flags = [*FLAGS, *corpus.flags, "--save", str(tmp_path), "--load", str(tmp_path)]
    for seed, stop in (("1", "1"), ("1", "2"), ("2", "3")):
        done = run_program(PROGRAM, *flags, "--seed", seed, "--exit-interval", stop)
        assert done.returncode == 0, done.stderr[-2000:]
        is_said = "may be others than the checkpoint's run would have seen" in done.stdout
        assert is_said == (seed == "2")


def test_a_blend_trains_without_evaluation(corpus, tmp_path):
    data = corpus.flags[1]
    blend = ["--data-path", "0.5", data, "0.5", data, *corpus.flags[2:], "--save", str(tmp_path)]
    assert not run(1, *blend, "--eval-iters", "0", "--exit-interval", "1")


# --- which checkpoint --------------------------------------------------------------------------


def test_a_start_says_where_it_goes_on_or_that_it_is_the_first(corpus, whole, tmp_path):
    flags = [*corpus.flags, *corpus.let(*KINDS["dropout"].split()), "--exit-interval", "1"]
    save = str(whole / "dropout")
    assert "starts from step 0 and would overwrite" in run(1, *flags, "--save", save)
    folders = ["--load", f"{tmp_path}/mistyped", "--save", f"{tmp_path}/new"]
    assert "No checkpoint in" in run(1, *flags, *folders)
    assert not run(1, *flags, "--load", folders[-1], *folders[-2:])
    assert set(series(tmp_path / "new", "lm loss")) == {1}


def test_an_argument_that_older_code_did_not_have_is_its_default(corpus, whole, tmp_path):
    save = tmp_path / "run"
    shutil.copytree(whole / "dropout", save)
    gone = ("let_teacher_layer", "teacher_control")
    change = "tests.attack.poison:change_args"
    run_distributed(change, 1, save / "iter_0000006", {}, gone)
    flags = KINDS["dropout"].split()
    error = resume(corpus, save, tmp_path / "other", 6, *flags, "--teacher-control", "zero")
    assert "--teacher-control zero" in error and "--teacher-control none" in error
    assert not resume(corpus, save, tmp_path / "other", 6, *flags)
    assert hashes(tmp_path / "other") == hashes(whole / "dropout")


def test_an_argument_that_this_version_does_not_have_must_have_been_the_default(
    corpus, whole, tmp_path
):
    save, flags = tmp_path / "run", KINDS["dropout"].split()
    shutil.copytree(whole / "dropout", save)
    change = "tests.attack.poison:change_args"
    removed = {"let_pair": "L2E", "let_loss": "cosine", "let_resize_side": "teacher"}
    run_distributed(change, 1, save / "iter_0000006", removed, ())
    assert not resume(corpus, save, tmp_path / "other", 6, *flags)
    assert hashes(tmp_path / "other") == hashes(whole / "dropout")
    run_distributed(change, 1, save / "iter_0000006", {"let_resize_side": "student"}, ())
    error = resume(corpus, save, tmp_path / "another", 6, *flags)
    assert "was saved with --let-resize-side student, which this version has no more" in error
