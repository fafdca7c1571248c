"""The examples of docs/extending.md, from a folder outside the tree.

Tolerance of the own script's losses against `pretrain_let.py`'s: none, they are the same bits.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from megatron.core.safe_globals import SAFE_GLOBALS
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, Starcoder2Config, Starcoder2ForCausalLM

from megatron_let.commands.convert_checkpoint import main as convert
from megatron_let.conversion.families import FAMILIES
from tests.distributed.training import run, series
from tests.support.tiny_run import FLAGS, checkpoint, hashes

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "extending.md").read_text()
BOTH = "--kd-stop-step 6 --kd-weight 0.5".split()
"""With these let+salt guides by LET in the first 4 of 8 steps, by SALT in the first 6."""


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```$", TEXT, re.M | re.S)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The examples as files, by name."""
    folder = tmp_path_factory.mktemp("outside")
    found = {}
    for block in blocks("python"):
        name = re.match(r"# (\w+\.py)\n", block)[1]
        found[name] = folder / name
        found[name].write_text(block)
    return found


def code_lines(path):
    lines = path.read_text().splitlines()
    return [line for line in lines if line.strip() and not line.strip().startswith(("#", '"""'))]


def test_they_are_as_short_as_is_said(files):
    assert len(code_lines(files["my_loss.py"])) <= 10
    assert len(code_lines(files["truncation.py"])) <= 40


def test_a_loss(corpus, files, tmp_path):
    module = ["--method-module", str(files["my_loss.py"])]
    for loss in ("cosine", "squared"):
        save = ["--save", str(tmp_path / loss)]
        assert not run(1, *corpus.flags, *corpus.let("--let-loss", loss), *module, *save)
    squared, cosine = (series(tmp_path / loss, "let loss") for loss in ("squared", "cosine"))
    assert squared.keys() == cosine.keys() and squared[4] < squared[1]
    assert squared[1] != cosine[1]
    # Normalised vectors of H elements: their mean squared difference is about 2 (1 - cos).
    assert squared[1] == pytest.approx(2 * cosine[1], rel=0.2)


def test_a_method(corpus, files, tmp_path):
    method = ["--method-module", str(files["truncation.py"]), "--method", "truncation"]
    assert not run(1, *corpus.flags, "--save", str(tmp_path / "plain"))
    for above in ("1000", "5.5"):
        own = [*method, "--truncate-above", above, "--save", str(tmp_path / above)]
        assert not run(1, *corpus.flags, *own)
    weights = {name: hashes(tmp_path / name) for name in ("plain", "1000", "5.5")}
    assert weights["plain"] == weights["1000"] != weights["5.5"]
    error = run(1, *corpus.flags, *method, "--truncate-above", "-1")
    assert "--truncate-above -1.0 must be positive" in error
    error = run(1, *corpus.flags, *method[:2], "--truncate-above", "5")
    assert "--truncate-above has no effect with --method baseline" in error
    resume = ["--load", str(tmp_path / "5.5"), "--save", str(tmp_path / "5.5")]
    error = run(1, *corpus.flags, *method, "--truncate-above", "7", *resume)
    assert "--truncate-above 7.0, the checkpoint" in error


def test_a_listener(corpus, files, tmp_path):
    module = ["--method-module", str(files["heartbeat.py"])]
    flags = [*corpus.flags, *module, "--save", str(tmp_path), "--load", str(tmp_path)]
    assert not run(1, *flags, "--exit-interval", "3")
    assert not run(1, *flags)
    assert (tmp_path / "heartbeat").read_text().startswith("8 steps, the last at ")
    # The twin: from the weights alone it is another run, whose steps count anew.
    new = [*corpus.flags, *module, "--load", str(tmp_path), "--finetune", "--save"]
    assert not run(1, *new, str(tmp_path / "new"), "--exit-interval", "2")
    assert (tmp_path / "new" / "heartbeat").read_text().startswith("2 steps")


REPORTS = """
import numpy as np
import torch
from megatron_let.upstream.loop_hooks import LISTENERS, Listener

class Mine(Listener):
    def __init__(self, args):
        pass

    def after_step(self, step):
        step.reported["my value"] = torch.tensor(7.0)

    def state(self):
        return {"scalar": np.float32(0.5), "tensor": torch.ones(2)}

class Other(Mine):
    def state(self):
        return {"an object": self}

LISTENERS.extend([Mine, Other])
"""


def test_what_a_listener_reports_is_recorded(corpus, tmp_path):
    (tmp_path / "mine.py").write_text(REPORTS)
    module = ["--method-module", str(tmp_path / "mine.py")]
    assert not run(1, *corpus.flags, *module, "--save", str(tmp_path), "--exit-interval", "2")
    assert series(tmp_path, "my value") == {1: 7.0, 2: 7.0}
    torch.serialization.add_safe_globals(SAFE_GLOBALS)  # as in a run
    assert checkpoint(tmp_path).unreadable_state() is None  # as with an object it would be
    states = checkpoint(tmp_path).args().listener_states
    assert states["Mine"] == {"scalar": 0.5, "tensor": [1.0, 1.0]} and "Other" not in states


def test_what_is_not_there(corpus, tmp_path):
    error = run(1, *corpus.flags, "--method-module", str(tmp_path / "no.py"))
    assert f"--method-module {tmp_path}/no.py: there is no such Python file" in error
    broken = tmp_path / "broken.py"
    for text, told in (
        ("def f(:", ".py cannot be run: SyntaxError: invalid syntax (broken.py, line 1)"),
        ("\n{}['a']", ".py, line 2 cannot be run: KeyError: 'a'"),
    ):
        broken.write_text(text)
        error = run(1, *corpus.flags, "--method-module", str(broken))
        assert f"--method-module {tmp_path}/broken{told}" in error


@pytest.mark.timeout(240)
def test_a_family(files, tmp_path, capsys):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 64}
    config = Starcoder2Config(
        **sizes, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
        sliding_window=None, tie_word_embeddings=False, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = Starcoder2ForCausalLM(config)
    for weight in model.parameters():  # biases and norms too
        torch.nn.init.normal_(weight, std=0.2)
    model.save_pretrained(tmp_path / "hf")
    module = ["--family-module", str(files["starcoder2.py"])]
    there = ["--hf-model", str(tmp_path / "hf"), "--output", str(tmp_path / "megatron")]
    convert(["from-hf", *module, *there, "--verify"])
    assert "Verified: " in capsys.readouterr().out
    back = ["--load", str(tmp_path / "megatron"), "--output", str(tmp_path / "back")]
    convert(["to-hf", *module, *back])
    del FAMILIES[-1]  # this process goes on to other tests
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    assert type(again) is Starcoder2ForCausalLM
    state = again.state_dict()
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())


# --- a script of one's own ----------------------------------------------------------------------


def with_guidance(script, folder):
    """The script, changed as the documentation says."""
    text = script.read_text()
    for block in blocks("diff"):
        lines = block.splitlines()
        old, new = ("\n".join(x[1:] for x in lines if x[:1] in (" ", sign)) for sign in "-+")
        assert text.count(old) == 1, f"{script} has not once:\n{old}"
        text = text.replace(old, new)
    changed = folder / script.name
    changed.write_text(text)
    for name in ("gpt_builders.py", "model_provider.py"):
        if (script.parent / name).exists():
            shutil.copy(script.parent / name, folder)
    return changed


def losses(folder, tag="lm loss"):
    """In float32, as TensorBoard has them."""
    events = EventAccumulator(str(folder))
    events.Reload()
    return [event.value for event in events.Scalars(tag)]


def check_own_script(script, corpus, folder, ranks, method):
    own = with_guidance(script, folder)
    flags = [*FLAGS, *corpus.flags, *corpus.let(*method), "--tensorboard-log-interval", "1"]
    flags.remove("--cpu")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node", str(ranks), "-m", "tests.support.run_own", str(own)]
    result = subprocess.run(
        [*command, *flags, "--tensorboard-dir", str(folder / "own")],
        cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    assert not run(ranks, *flags, "--cpu", "--save", str(folder / "ours"))
    for tag in ("lm loss", "let loss", "kd loss", "lm loss validation"):
        expected = losses(folder / "ours" / "tensorboard", tag)
        assert losses(folder / "own", tag) == expected and expected, tag
    # The twin: what is compared does react to the guidance.
    assert not run(1, *FLAGS, *corpus.flags, "--save", str(folder / "plain"))
    assert losses(folder / "plain" / "tensorboard") != losses(folder / "own")


@pytest.mark.timeout(240)
def test_a_script_of_ones_own(corpus, tmp_path):
    script = ROOT / "tests" / "support" / "pretrain_own.py"
    check_own_script(script, corpus, tmp_path, 1, ["--method", "let+salt", *BOTH])


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(
    "MEGATRON_LM_PATH" not in os.environ,
    reason="set MEGATRON_LM_PATH to a checkout of Megatron-LM at core_v0.19.0",
)
@pytest.mark.parametrize("ranks", [1, 4])
def test_megatron_lms_own_script(corpus, tmp_path, ranks):
    script = Path(os.environ["MEGATRON_LM_PATH"]) / "pretrain_gpt.py"
    layout = "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 --sequence-parallel"
    method = ["--method", "let+salt", *BOTH, *(layout.split() if ranks == 4 else [])]
    check_own_script(script, corpus, tmp_path, ranks, method)


def test_checkpoints_of_examples_are_checkpoints(corpus, files, tmp_path):
    """What an outsider's listener keeps does not get into anyone's way."""
    module = ["--method-module", str(files["heartbeat.py"])]
    assert not run(1, *corpus.flags, *module, "--save", str(tmp_path), "--exit-interval", "2")
    assert checkpoint(tmp_path).args().listener_states["Heartbeat"] == {"steps": 2}
    plain = ["--load", str(tmp_path), "--save", str(tmp_path)]
    assert not run(1, *corpus.flags, *plain)
