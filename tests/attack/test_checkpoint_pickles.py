"""No byte of a checkpoint is executed, by whichever flag it comes in.

Each way has its twin: Megatron by itself, without the door, executes the same bytes.
"""

import io
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_let.conversion.to_hf import export
from megatron_let.errors import UsageError
from tests.attack.poison import (
    poison_entries,
    poison_metadata,
    poisoned_archive,
)
from tests.support.testing import WorkerPool, run_distributed, run_program
from tests.support.tiny_run import FLAGS, Corpus

SHORT = "--train-iters 3 --save-interval 1 --eval-interval 10".split()
NO_DATA = re.compile(r"it names (builtins\.)?open, which is no (meta)?data")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Corpus:
    folder = tmp_path_factory.mktemp("corpus")
    return run_distributed("tests.support.tiny_run:make_corpus", 1, folder)[0]


@pytest.fixture(scope="module")
def train(corpus):
    """Run with the door; return what it ended with, if not well."""

    def run(*flags: object) -> str:
        argv = [*FLAGS, *SHORT, *corpus.flags, *map(str, flags)]
        return run_distributed("tests.attack.runs:train", 1, argv)[0]

    return run


@pytest.fixture(scope="module")
def without(corpus):
    """Workers without the door."""
    pool = WorkerPool(1)

    def run(*flags: object) -> str:
        argv = [*FLAGS, *SHORT, *corpus.flags, *map(str, flags)]
        return pool.run("tests.attack.runs:train_without_the_door", argv)[0]

    run.pool = pool
    yield run
    pool.close()


@pytest.fixture(scope="module")
def clean(train, tmp_path_factory) -> Path:
    """Checkpoints of steps 1 and 2."""
    save = tmp_path_factory.mktemp("clean") / "run"
    assert not train("--save", save, "--exit-interval", 2)
    return save


class Case:
    """A copy of the checkpoints, and the folder where what is executed leaves its marks."""

    def __init__(self, clean: Path, folder: Path) -> None:
        self._clean, self.save, self._marks = clean, folder / "run", folder / "marks"
        self.other = folder / "other"
        self.renew()

    def renew(self) -> None:
        """Clean again, the newest of step 2."""
        for path in (self.save, self._marks, self.other):
            shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(self._clean, self.save)
        self._marks.mkdir()
        self.newest = self.save / "iter_0000002"

    def poison(self, *kinds: str, metadata: bool = False) -> None:
        """Put programs into the newest."""
        poison_entries(self.newest, self._marks, *kinds)
        if metadata:
            poison_metadata(self.newest, self._marks)

    def move_newest(self, folder: Path) -> None:
        """Move the newest; the tracker names the older one."""
        folder.mkdir()
        self.newest = self.newest.rename(folder / self.newest.name)
        for load, step in ((folder, 2), (self.save, 1)):
            (load / "latest_checkpointed_iteration.txt").write_text(str(step))

    @property
    def executed(self) -> set[str]:
        return {path.name for path in self._marks.iterdir()}


@pytest.fixture
def case(clean, tmp_path) -> Case:
    return Case(clean, tmp_path)


def load(case):
    return "--load", case.save, "--save", case.save


def load_elsewhere(case):
    return "--load", case.save, "--save", case.other


def step_without_tracker(case):
    (case.save / "latest_checkpointed_iteration.txt").unlink()
    return "--load", case.save, "--ckpt-step", 2, "--save", case.other


def pretrained(case):
    return "--pretrained-checkpoint", case.save, "--save", case.other


def non_persistent(case):
    case.move_newest(case.save / "non_persistent")
    return "--load", case.save, "--save", case.save, "--non-persistent-ckpt-type", "global"


def checkpoint_args(case):
    return "--load", case.save, "--save", case.other, "--use-checkpoint-args"


def another_backend(case):
    config = case.newest / "metadata.json"
    config.write_text(config.read_text().replace("torch_dist", "zarr"))
    return "--load", case.save, "--save", case.other


WAYS = [
    load,
    load_elsewhere,
    step_without_tracker,
    pretrained,
    non_persistent,
    checkpoint_args,
    another_backend,
]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_nothing_is_executed(train, without, case, way):
    for metadata in (False, True):
        flags = way(case)
        case.poison(metadata=metadata)
        error = train(*flags)
        assert not case.executed
        if way in (load, non_persistent):  # the run's own: it goes on from the one before
            assert not error
            assert case.newest.with_name("damaged_iter_0000002").is_dir()
        else:
            said = re.compile("--ckpt-format zarr") if way is another_backend else NO_DATA
            assert said.search(error) and str(case.newest) in error, error
        case.renew()
    flags = way(case)
    case.poison(metadata=True)
    without(*flags)
    assert case.executed >= {"metadata", "common_state"}


@pytest.mark.parametrize("kind", ["rng_state", "_extra_state"])  # what is read after the other
def test_no_entry_is_executed(train, without, case, kind):
    case.poison(kind)
    assert NO_DATA.search(train("--load", case.save, "--save", case.other))
    assert not case.executed
    without("--load", case.save, "--save", case.other)
    assert case.executed == {kind}


@pytest.mark.parametrize("flags", ["", "--auto-detect-ckpt-format", "--ckpt-format torch"])
def test_older_formats_are_not_executed(train, without, case, flags):
    """Nor with the environment variable by which torch executes what it loads."""
    saved = io.BytesIO()
    torch.save({"args": None, "iteration": 2}, saved)
    pickled = poisoned_archive(saved.getvalue(), case.save.parent / "marks" / "pickle")
    if flags:
        shutil.rmtree(case.newest)
        (case.newest / "mp_rank_00").mkdir(parents=True)
        (case.newest / "mp_rank_00" / "model_optim_rng.pt").write_bytes(pickled)
    else:
        (case.newest / "common.pt").write_bytes(pickled)
    words = ("--load", case.save, "--save", case.other, *flags.split())
    error = train(*words)
    assert "--ckpt-format torch" in error if flags else NO_DATA.search(error)
    assert not case.executed
    without(*words)
    assert case.executed == {"pickle"}


@pytest.mark.parametrize("part", ["metadata", "common.pt"])
def test_nor_by_the_libraries_readers(case, part):
    """Whoever calls them: the run above has looked at these files before."""
    case.poison("rng_state", metadata=part == "metadata")
    if part == "common.pt":
        saved = io.BytesIO()
        torch.save({"args": None}, saved)
        pickled = poisoned_archive(saved.getvalue(), case.save.parent / "marks" / part)
        (case.newest / part).write_bytes(pickled)
    said = run_distributed("tests.attack.runs:read_by_libraries", 1, str(case.newest))[0]
    assert len(said) == (2 if part == "metadata" else 1) and not case.executed
    assert all("open" in words for words in said)


def test_a_checkpoint_does_not_say_what_to_import(train, without, case):
    """`--spec` names a function; `this` is a module that nothing else imports."""
    change = ("tests.attack.poison:change_args", 1, case.newest, {"spec": ["this", "s"]})
    run_distributed(*change)
    flags = ("--load", case.save, "--save", case.other, "--use-checkpoint-args")
    assert "--spec ['this', 's'] names code" in train(*flags)
    imported = ("tests.attack.runs:is_imported", "this")
    assert run_distributed(imported[0], 1, imported[1]) == [False]
    without(*flags)
    assert without.pool.run(*imported) == [True]


def test_a_conversion_executes_nothing(case, tmp_path):
    case.poison("_extra_state")
    export(case.save, tmp_path / "hf")
    np.save(tmp_path / "tokens.npy", np.zeros((1, 4), dtype=np.int64))
    words = [case.newest, tmp_path / "tokens.npy", tmp_path / "logits.npy", "float32"]
    result = run_program("megatron_let.conversion.megatron_logits", *map(str, words))
    assert NO_DATA.search(result.stderr.splitlines()[-1]) and not case.executed
    run_program("tests.attack.logits_without_the_door", *map(str, words))
    assert case.executed == {"_extra_state"}
    case.poison("common_state")
    with pytest.raises(UsageError, match="not data alone"):
        export(case.save, tmp_path / "again")
    case.poison(metadata=True)
    with pytest.raises(UsageError, match=NO_DATA):
        export(case.save, tmp_path / "again", ckpt_step=2)
    assert case.executed == {"_extra_state"}
