"""Python that comes with a model's or tokenizer's files: nothing runs it, not for a "y" either.

Each tool meets a folder whose files all name the code; each file alone meets the door that all the
tools share.
"""

import json
import re
from pathlib import Path

import pytest
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from megatron_let import hugging_face
from megatron_let.errors import UsageError
from tests.support.testing import run_program
from tests.support.tiny_run import FLAGS

ROOT = Path(__file__).resolve().parents[2]
AUTO_MAP = {
    "AutoConfig": "stranger.Config",
    "AutoModelForCausalLM": "stranger.Model",
    "AutoTokenizer": ["stranger.Tokenizer", "stranger.Tokenizer"],
    "AutoProcessor": "stranger.Processor",
}
FILES = "config.json tokenizer_config.json generation_config.json processor_config.json".split()
KEYS = {
    "model_type": "config.json",
    "attn_implementation": "config.json",
    "tokenizer_class": "tokenizer_config.json",
}
UNKNOWN = {"model_type": "strange", "tokenizer_class": "Strange"}
CODE = """
from pathlib import Path
Path({marker!r}).touch()
from transformers import {base}
class Config({base}):  # transformers marks the class, which must not be its own
    pass
Model = Tokenizer = Processor = Config
"""


def make_hostile(folder: Path, files: list[str], marker: Path, **config: object) -> Path:
    """Have these files of a folder name code that leaves a mark when it is imported."""
    (folder / "stranger.py").write_text(CODE.format(marker=str(marker), base="LlamaConfig"))
    for name in files:
        path = folder / name
        values = json.loads(path.read_text()) if path.exists() else {}
        values |= {key: value for key, value in config.items() if KEYS[key] == name}
        path.write_text(json.dumps(values | {"auto_map": AUTO_MAP}))
    return folder


@pytest.fixture
def hostile(corpus, tmp_path):
    """A function that makes a hostile copy of a teacher."""

    def make(files: list[str] = FILES, **config: object) -> Path:
        folder = tmp_path / "hostile"
        folder.mkdir()
        for path in (corpus.folder / "teacher").iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
        return make_hostile(folder, files, tmp_path / "marker", **config)

    return make


def test_the_payload_runs_where_it_is_trusted(hostile, tmp_path):
    folder = hostile(**UNKNOWN)
    AutoConfig.from_pretrained(folder, trust_remote_code=True)
    assert (tmp_path / "marker").exists()


TOOLS = {
    "teacher": "pretrain_let.py DATA --method let --let-stop-step 4 --teacher-model HOSTILE",
    "untrained teacher": "pretrain_let.py DATA --method let --let-stop-step 4 "
    "--teacher-control random --teacher-model HOSTILE",
    "student's tokenizer": "pretrain_let.py DATA --tokenizer-model HOSTILE",
    "from-hf": "tools/convert_checkpoint.py from-hf --hf-model HOSTILE --output TMP/out",
    "evaluate text": "tools/evaluate.py text HOSTILE --input CORPUS/text.jsonl --output TMP/out "
    "--device cpu",
    "evaluate tasks": "tools/evaluate.py tasks HOSTILE --output TMP/out --device cpu",
    "preprocess": "tools/preprocess_data.py --input CORPUS/text.jsonl --output-prefix TMP/out "
    "--tokenizer-model HOSTILE",
}


@pytest.mark.parametrize("tool", TOOLS)
def test_no_tool_runs_it(tool, hostile, corpus, tmp_path):
    folder = hostile(**UNKNOWN)
    names = {"HOSTILE": str(folder), "TMP": str(tmp_path), "CORPUS": str(corpus.folder)}
    program, *argv = TOOLS[tool].split()
    if "DATA" in argv:
        argv[:1] = [*FLAGS, *corpus.flags, "--save", "TMP/save"]
    argv = [re.sub("HOSTILE|TMP|CORPUS", lambda found: names[found[0]], word) for word in argv]
    result = run_program(str(ROOT / "tests/attack/say_yes.py"), str(ROOT / program), *argv)
    assert not (tmp_path / "marker").exists()
    assert result.returncode == 2 and "Traceback" not in result.stderr, result.stderr
    assert "remote code" in result.stderr.splitlines()[-1], result.stderr
    assert "run the custom code" not in result.stdout


@pytest.mark.parametrize("auto", [AutoConfig, AutoTokenizer, AutoModelForCausalLM])
@pytest.mark.parametrize("file", FILES)
def test_a_family_that_transformers_knows_loads_without_it(file, auto, hostile, tmp_path):
    hugging_face.load(auto, hostile([file]), "fails")
    assert not (tmp_path / "marker").exists()


def test_a_kernel_of_the_hub_is_code(hostile):
    with pytest.raises(UsageError, match="remote code"):
        hugging_face.load(AutoConfig, hostile([FILES[0]], attn_implementation="a/kernel"), "fails")


def test_code_that_nobody_needs_is_no_cause(hostile):
    folder = hostile()
    (folder / "model.safetensors").unlink()
    with pytest.raises(UsageError, match="cannot be loaded. .*no file named model.safetensors"):
        hugging_face.load(AutoModelForCausalLM, folder)
