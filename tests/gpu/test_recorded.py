"""The teacher's recorded pass against the same model's on the CPU in float32: `pytest -m gpu`."""

import copy
import gc
import weakref

import pytest
import torch

from megatron_let.teacher.load import load_causal_lm, read_teacher_config
from megatron_let.teacher.recorded import SHAPES, Recorded
from megatron_let.teacher.stage import Teacher
from tests.support.testing import ARCHITECTURES, save_tiny_teacher

pytestmark = pytest.mark.gpu
FP32_TOLERANCE = 1e-4
"""Relative, of all states: TF32 is off by default."""
CONTEXT = 128


def some_tokens(seed, rows=3, length=17):
    return torch.randint(0, 256, (rows, length), generator=torch.Generator().manual_seed(seed))


def error(found, wanted):
    return ((found.cpu() - wanted).norm() / wanted.norm()).item()


@pytest.fixture(scope="module", params=ARCHITECTURES)
def models(request, tmp_path_factory):
    config = read_teacher_config(
        str(save_tiny_teacher(tmp_path_factory.mktemp("t"), request.param))
    )
    return [load_causal_lm(config, torch.float32, torch.device(d)) for d in ("cuda", "cpu")]


@pytest.mark.parametrize("layer", [None, 1])
def test_states_are_those_of_the_cpu(models, layer, capsys):
    gpu, cpu = (Teacher(copy.deepcopy(model), CONTEXT, layer) for model in models)
    for teacher in (gpu, cpu):
        teacher.keep_states_only()
    results = []
    for seed in (0, 1, 0):  # a second row set in the place of the first
        tokens = some_tokens(seed)
        results.append(gpu.states_BSD({"tokens": tokens.cuda()}))
        assert error(results[-1], cpu.states_BSD({"tokens": tokens})) < FP32_TOLERANCE
    assert torch.equal(results[0], results[2])
    assert error(results[1], results[0].cpu()) > 100 * FP32_TOLERANCE  # the tolerance sees it
    assert len(gpu._pass._passes) == 1
    assert "uncompiled" not in capsys.readouterr().out


def test_documents_kept_apart_and_windows_are_recorded_too(models):
    gpu, cpu = (Teacher(copy.deepcopy(model), CONTEXT) for model in models)
    mask = torch.ones(17, 17, dtype=torch.bool).triu(1)
    mask[9:, :9] = True
    rows = {
        "tokens": some_tokens(0),
        "position_ids": torch.cat([torch.arange(9), torch.arange(8)]).expand(3, -1).contiguous(),
        "attention_mask": mask.expand(3, 1, -1, -1).contiguous(),
    }
    long = {"tokens": some_tokens(0, length=CONTEXT + 40)}
    for inputs in (rows, long):
        on_gpu = {name: tensor.cuda() for name, tensor in inputs.items()}
        assert error(gpu.states_BSD(on_gpu), cpu.states_BSD(inputs)) < FP32_TOLERANCE
    assert len(gpu._pass._passes) == 2


def test_a_released_teacher_leaves_no_memory(models):
    model = copy.deepcopy(models[0])
    teacher = Teacher(model, CONTEXT)
    teacher.states_BSD({"tokens": some_tokens(0).cuda()})
    held = weakref.ref(model.base_model), weakref.ref(teacher._pass)
    assert all(reference() is not None for reference in held)
    del model, teacher
    gc.collect()
    assert [reference() for reference in held] == [None, None]


def test_a_pass_that_waits_for_the_device_runs_as_it_is(capsys):
    def waits(inputs):
        return inputs["x"] * inputs["x"].sum().item()

    recorded = Recorded(waits, torch.nn.ModuleList())
    x = torch.arange(4.0, device="cuda")
    stream = torch.cuda.current_stream()
    assert recorded({"x": x}).tolist() == [0, 6, 12, 18]
    assert "the teacher runs uncompiled" in capsys.readouterr().out
    assert torch.cuda.current_stream() == stream
    assert recorded({"x": x + 1}).tolist() == [10, 20, 30, 40]


def test_shapes_beyond_the_limit_run_as_they_are():
    recorded = Recorded(lambda inputs: inputs["x"] + 1, torch.nn.ModuleList())
    for number in range(1, 8):
        assert recorded({"x": torch.zeros(number, device="cuda")}).sum() == number
        assert len(recorded._passes) == min(number, SHAPES)
