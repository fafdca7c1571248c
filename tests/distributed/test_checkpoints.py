"""What a checkpoint holds, and who can load it."""

import json
import shutil

import pytest
from transformers import AutoModelForCausalLM

from megatron_let.conversion.to_hf import export
from tests.distributed.training import TP2_PP2, only_weights, records, run, series
from tests.support.tiny_run import checkpoint, hashes, tensor_names

METHODS = {"baseline": None, "let": "", "linear": "--let-resize linear"}
LEARNED_MAP = "decoder.layers.let_resize.weight"
# One step at learning rate 0 saves the weights that a run starts with.
INITIAL = "--lr 0 --min-lr 0 --weight-decay 0 --exit-interval 1".split()


def method_flags(corpus, name):
    return [] if METHODS[name] is None else corpus.let(*METHODS[name].split())


@pytest.fixture(scope="session")
def initial(corpus, tmp_path_factory):
    """The initial checkpoint of a method in a layout."""
    made = {}

    def save(method, layout=()):
        key = (method, bool(layout))
        if key not in made:
            folder = tmp_path_factory.mktemp(method)
            flags = [*corpus.flags, *method_flags(corpus, method), *layout, *INITIAL]
            assert not run(4 if layout else 1, *flags, "--save", str(folder))
            made[key] = folder
        return made[key]

    return save


@pytest.fixture(scope="session")
def trained(corpus, tmp_path_factory):
    """Runs of all methods, ended after 2 of 8 steps."""
    folder = tmp_path_factory.mktemp("trained")
    for method in METHODS:
        flags = [*corpus.flags, *method_flags(corpus, method), "--exit-interval", "2"]
        assert not run(1, *flags, "--save", str(folder / method))
    return folder


@pytest.mark.parametrize("layout", [[], TP2_PP2], ids=["single", "tp2_pp2"])
@pytest.mark.parametrize("method", ["let", "linear"])
def test_methods_start_from_the_same_weights(initial, method, layout):
    expected, actual = (hashes(initial(name, layout)) for name in ("baseline", method))
    expected, actual = ({n: h[n] for n in only_weights(h)} for h in (expected, actual))
    assert actual.keys() - expected.keys() == ({LEARNED_MAP} if method == "linear" else set())
    assert {name: actual[name] for name in expected} == expected


# --- what is in it -----------------------------------------------------------------------------


def test_nothing_of_the_teacher_is_saved(trained):
    baseline, let, linear = (checkpoint(trained / method) for method in METHODS)
    assert let.names == baseline.names
    added = tensor_names(linear) - tensor_names(baseline)
    assert added == {LEARNED_MAP} | {
        f"optimizer.state.{moment}.{LEARNED_MAP}" for moment in ("exp_avg", "exp_avg_sq")
    }
    assert linear.names - baseline.names == added


def test_our_arguments_are_plain_scalars(trained):
    """Or `torch.load(weights_only=True)`, with which Megatron reads them, would refuse them."""
    args = vars(checkpoint(trained / "linear").args())
    ours = {n: v for n, v in args.items() if n.startswith(("let_", "teacher_", "method", "cpu"))}
    assert {"method", "cpu", "let_layer", "let_stop_step", "teacher_fingerprint"} <= ours.keys()
    assert all(type(value) in (str, int, float, bool, type(None)) for value in ours.values())


def test_the_learned_map_is_trained_and_not_exported(initial, trained, tmp_path):
    before, after = (hashes(folder) for folder in (initial("linear"), trained / "linear"))
    assert before[LEARNED_MAP] != after[LEARNED_MAP]
    folder = export(trained / "linear", tmp_path / "hf")
    expected = export(trained / "baseline", tmp_path / "baseline")
    names = [set(AutoModelForCausalLM.from_pretrained(f).state_dict()) for f in (folder, expected)]
    assert names[0] == names[1]


# --- who loads it ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("saved", "loading"), [("let", "baseline"), ("linear", "baseline"), ("baseline", "let")]
)
def test_another_method_goes_on(corpus, trained, tmp_path, saved, loading):
    flags = [*corpus.flags, *method_flags(corpus, loading), "--exit-interval", "4"]
    assert not run(1, *flags, "--load", str(trained / saved), "--save", str(tmp_path))
    assert set(series(tmp_path, "lm loss")) == {1, 2, 3, 4}
    names = tensor_names(checkpoint(tmp_path))
    assert names == tensor_names(checkpoint(trained / loading))


@pytest.mark.parametrize("finetune", [[], ["--finetune"]], ids=["resume", "finetune"])
def test_a_learned_map_that_was_never_saved_is_named(corpus, trained, tmp_path, finetune):
    flags = [*corpus.flags, *method_flags(corpus, "linear"), *finetune]
    error = run(1, *flags, "--load", str(trained / "baseline"), "--save", str(tmp_path))
    assert "holds no learned map" in error and "--let-resize interpolate" in error


# --- validation --------------------------------------------------------------------------------


def test_evaluation_leaves_nothing_behind(corpus, tmp_path):
    """Twice the same run, with an evaluation after each step and without any."""
    for name, interval in (("often", "1"), ("never", "100")):
        flags = [*corpus.flags, *corpus.let("--let-decay", "step"), "--exit-interval", "4"]
        flags += ["--hidden-dropout", "0.1", "--eval-interval", interval]
        assert not run(1, *flags, "--save", str(tmp_path / name))
    assert set(records(tmp_path / "often", "valid")) == {1, 2, 3, 4}
    assert not records(tmp_path / "never", "valid")
    assert hashes(tmp_path / "often") == hashes(tmp_path / "never")
    for key in ("lm loss", "let loss"):
        assert series(tmp_path / "often", key) == series(tmp_path / "never", key)


def test_validation_is_the_language_model_loss_alone(corpus, tmp_path):
    """Both evaluate the same weights on the same samples, one of them with a teacher at hand."""
    flags = [*corpus.flags, "--train-iters", "3", "--eval-interval", "100"]
    let = corpus.let("--let-stop-step", "3", "--let-decay", "step")
    assert not run(1, *flags, *let, "--save", str(tmp_path / "let"))
    trained = (tmp_path / "let" / "metrics.jsonl").read_bytes()
    load = ["--load", str(tmp_path / "let"), "--save", str(tmp_path / "let"), "--skip-train"]
    assert not run(1, *flags, *load)
    [with_teacher] = records(tmp_path / "let", "valid").values()
    [plain] = records(tmp_path / "let", "valid", "evaluated.jsonl").values()
    assert with_teacher["lm loss"] == plain["lm loss"]
    assert (tmp_path / "let" / "metrics.jsonl").read_bytes() == trained
    assert not [key for key in with_teacher if key.startswith("let")]


def test_a_requeued_run_goes_on_from_its_short_lived_checkpoint_elsewhere(corpus, tmp_path):
    """Not as a new run from weights, though its `--save` holds nothing yet."""
    save, base, elsewhere = (tmp_path / name for name in ("save", "base", "elsewhere"))
    assert not run(1, *corpus.flags, "--save", str(base), "--exit-interval", "1")
    flags = [*corpus.flags, "--save", str(save), "--load", str(save)]
    flags += ["--pretrained-checkpoint", str(base), "--non-persistent-ckpt-type", "global"]
    flags += ["--non-persistent-global-ckpt-dir", str(elsewhere)]
    flags += ["--non-persistent-save-interval", "2"]
    assert not run(1, *flags, "--exit-interval", "3")
    shutil.rmtree(save / "iter_0000003")
    (save / "latest_checkpointed_iteration.txt").unlink()
    assert not run(1, *flags, "--exit-interval", "3")
    assert sorted(records(save, "start")) == [0, 2]


def test_each_validation_set_has_a_record_and_their_mean_counts(corpus, tmp_path):
    data = f"{corpus.folder}/text_text_document"
    at = corpus.flags.index("--data-path")
    flags = [*corpus.flags[:at], *corpus.flags[at + 4 :], "--train-data-path", data]
    flags += ["--valid-data-path", data, data, "--full-validation"]
    error = run(1, *flags, "--save", str(tmp_path))
    assert error and "--full-validation and --multiple-validation-sets go together" in error
    flags += ["--multiple-validation-sets", "--validation-set-names", "one", "other"]
    assert not run(1, *flags, "--save", str(tmp_path), "--exit-interval", "4")
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    sets = [line for line in lines if line["kind"] == "valid set" and line["iteration"] == 3]
    assert [line["set"] for line in sets] == ["one", "other"]
    mean = sum(line["lm loss"] for line in sets) / 2
    assert records(tmp_path, "valid")[3]["lm loss"] == pytest.approx(mean)
    assert [line["kind"] for line in lines if line["iteration"] == 3].count("valid") == 1


SETS = "--full-validation --multiple-validation-sets".split()


VALIDATION = {
    "dp4": (4, ()),  # 78 rows: two ranks have one less
    "tp2_dp2": (4, ("--tensor-model-parallel-size", "2", "--sequence-parallel")),
    "pp4": (4, ("--pipeline-model-parallel-size", "4", "--eval-micro-batch-size", "5")),
}


@pytest.mark.parametrize("name", VALIDATION)
def test_a_whole_set_counts_every_row_once_in_every_layout(initial, corpus, tmp_path, name):
    """The loss of one row at a time to 1e-6; one counted twice changes it by some 1e-4."""
    ranks, layout = VALIDATION[name]
    still = ("--load", str(initial("baseline")), *INITIAL[:-2], "--exit-interval", "3")
    flags = [*corpus.flags, *SETS, *still, "--save"]
    assert not run(1, *flags, str(tmp_path / "one"), "--eval-micro-batch-size", "1")
    assert not run(ranks, *flags, str(tmp_path / "layout"), *layout)
    one, other = (records(tmp_path / name, "valid")[3]["lm loss"] for name in ("one", "layout"))
    assert other == pytest.approx(one, rel=1e-6)


def test_a_blend_is_evaluated_whole(corpus, tmp_path):
    """Half of its 156 rows are of each path, so that its loss is that of one path."""
    data = f"{corpus.folder}/text_text_document"
    at = corpus.flags.index("--data-path")
    rest = [
        *corpus.flags[:at],
        *corpus.flags[at + 2 :],
        *SETS,
        *INITIAL[:-2],
        "--exit-interval",
        "3",
    ]
    rest += ["--eval-micro-batch-size", "5"]  # the last batch lacks rows
    for name, paths in (("one", [data]), ("blend", [data, data])):
        assert not run(1, *rest, "--data-path", *paths, "--save", str(tmp_path / name))
    one, blend = (records(tmp_path / name, "valid")[3]["lm loss"] for name in ("one", "blend"))
    assert blend == pytest.approx(one, rel=1e-6)


def test_a_part_for_a_test_ends_no_run_with_whole_sets(corpus, tmp_path):
    """Megatron's loop over sets takes its iterator for a list.

    Started again when it is complete, a run leaves its last checkpoint as it is; of a blend no
    sample is left.
    """
    flags = [*corpus.flags, *SETS, "--split", "70,20,10", "--train-iters", "2", "--data-path"]
    flags += [f"{corpus.folder}/text_text_document"] * 2
    written = []
    for _ in range(2):
        assert not run(1, *flags, "--save", str(tmp_path), "--load", str(tmp_path))
        written.append((tmp_path / "iter_0000002" / ".metadata").stat().st_mtime_ns)
    assert written[0] == written[1]


def test_whole_sets_that_cannot_be_had_are_refused(corpus):
    virtual = ("--pipeline-model-parallel-size", "2", "--num-layers-per-virtual-pipeline-stage")
    for ranks, flags, why in (
        (1, ("--split", "100,0,0"), "or leave --full-validation out"),
        (2, (*virtual, "1"), "--full-validation does not go with virtual pipeline stages"),
    ):
        error = run(ranks, *corpus.flags, *SETS, *flags)
        assert error and why in error
