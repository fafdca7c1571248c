"""The house's rules (CONTRIBUTING.md); each has a twin in which a file breaks it."""

import re
import subprocess
import sys
from importlib.metadata import version

import pytest

from megatron_let.methods.table import METHODS
from tests.unit.house import ROOT, arrows, circle, named_methods, private_names, room, sources

FILES = sources("megatron_let")
CALLERS = FILES
DOOR = "megatron_let/data/checked.py"


def with_line(line):
    return FILES | {DOOR: FILES[DOOR] + f"\n{line}\n"}


def test_the_rooms_form_no_circle():
    assert circle(FILES) == []
    # A local import counts as well.
    back = "def late():\n    from megatron_let.training import log\n"
    assert "training" in circle(with_line(back)) and "data" in circle(with_line(back))


def test_what_megatron_keeps_to_itself_is_named_in_upstream_alone():
    assert private_names(CALLERS) == []


@pytest.mark.parametrize(
    "line",
    [
        "from megatron.core.safe_globals import _reconstruct",
        "from megatron.training import checkpointing\ncheckpointing._load_base_checkpoint()",
        "from megatron.training import get_tokenizer\nget_tokenizer()._tokenizer.tokenizer",
        "from megatron.training import training\ntraining.evaluate = print",
        "from megatron.training import training\nsetattr(training, 'evaluate', print)",
    ],
)
def test_and_a_file_that_does_is_found(line):
    assert [place.split(":")[0] for place in private_names(with_line(line))][0] == DOOR


def test_a_methods_name_stands_in_the_table_alone():
    program = {path: text for path, text in CALLERS.items() if room(path) != "quickstart"}
    assert named_methods(program, set(METHODS)) == []  # which runs some of them, as a user does
    assert named_methods(with_line("NAME = 'let+salt'"), set(METHODS))


def test_the_map_of_rooms_is_the_house():
    text = (ROOT / "docs" / "how_it_works.md").read_text()
    rows = dict(re.findall(r"^\| `(\w+)` \| .* \| ([\w, ]+) \|$", text, re.M))
    rooms = {room(path) for path in FILES} - {"__init__", "__main__"}
    all_of_them = sorted(arrows(FILES))
    found = {name: [end for start, end in all_of_them if start == name] for name in rooms}
    assert rows == {name: ", ".join(ends) or "none" for name, ends in found.items()}


def test_the_picture_of_a_step_is_drawn(tmp_path):
    script, kept = (
        ROOT / "docs" / "guided_step.py",
        (ROOT / "docs" / "guided_step.png").read_bytes(),
    )
    subprocess.run([sys.executable, script, tmp_path / "step.png"], check=True)
    if f"Matplotlib version{version('matplotlib')}".encode() not in kept:
        pytest.skip("another version of Matplotlib has drawn the one that is kept")
    assert (tmp_path / "step.png").read_bytes() == kept
