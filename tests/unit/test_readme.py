"""What the README says exists."""

import re
from pathlib import Path

from megatron_let.testing import run_distributed

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def test_make_targets_exist():
    targets = re.findall(r"^make ([a-z-]+)", README, re.MULTILINE)
    makefile = (ROOT / "Makefile").read_text()
    assert {"quickstart", "test"} <= set(targets)
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets)


def test_linked_and_listed_files_exist():
    paths = re.findall(r"\]\(((?!http)[^)#]+)\)", README)
    paths += re.findall(r"python (\S+\.py)", README) + ["pretrain_let.py", "benchmarks"]
    tree = README.split("## The tree")[1].split("```")[1]
    paths += [f"megatron_let/{word}" for word in re.findall(r"^  ([a-z_]+(?:\.py|/))", tree, re.M)]
    missing = [path for path in paths if not (ROOT / path).exists()]
    assert not missing


def test_flags_and_defaults_of_the_table_are_the_parsers():
    rows = re.findall(r"^\| `(--[^|]*)` \| ([^|]*) \|", README, re.MULTILINE)
    flags = {flag for cell, _ in rows for flag in re.findall(r"--[a-z-]+", cell)}
    [known] = run_distributed("megatron_let.testing:our_flags", 1)
    assert flags <= known.keys()
    for cell, default in rows:
        name = re.findall(r"--[a-z-]+", cell)[0]
        if known[name] is not None:
            assert default.strip("` ") == str(known[name]), name
