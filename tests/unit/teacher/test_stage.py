"""The teacher's states and loss are Hugging Face's own; tolerance 1e-6 absolute, float32."""

import math

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_let.teacher.load import fingerprint, load_causal_lm, read_teacher_config
from megatron_let.teacher.stage import Teacher, near_random
from megatron_let.testing import ARCHITECTURES, run_distributed, save_tiny_teacher

VOCAB = 256
TOKENS_BS = torch.randint(0, VOCAB, (3, 17), generator=torch.Generator().manual_seed(0))
CLOSE = {"atol": 1e-6, "rtol": 0}


@pytest.fixture(scope="module", params=ARCHITECTURES)
def folder(request, tmp_path_factory):
    folder = save_tiny_teacher(tmp_path_factory.mktemp(request.param), request.param)
    # Norm weights away from one, so that a forgotten final norm shows.
    model = AutoModelForCausalLM.from_pretrained(folder)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 1:
                weight += 0.5 * torch.randn(weight.shape, generator=generator)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def reference(folder):
    """Hugging Face's model and output of `TOKENS_BS`."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return model, model(TOKENS_BS, labels=TOKENS_BS, output_hidden_states=True)


@pytest.fixture
def teacher(folder):
    config = read_teacher_config(str(folder))
    return Teacher(load_causal_lm(config, torch.float32, torch.device("cpu")))


def test_states_are_the_last_hidden_ones_after_the_final_norm(teacher, reference):
    states_SBD = teacher.states_SBD(TOKENS_BS)
    assert states_SBD.is_contiguous() and not states_SBD.requires_grad
    expected_BSD = reference[1].hidden_states[-1]
    torch.testing.assert_close(states_SBD, expected_BSD.transpose(0, 1), **CLOSE)


def test_head_maps_the_states_to_the_logits(teacher, reference):
    """The states are what the head reads, so nothing lies between them and the prediction."""
    model, output = reference
    with torch.no_grad():
        logits_BSV = model.get_output_embeddings()(teacher.states_SBD(TOKENS_BS).transpose(0, 1))
    torch.testing.assert_close(logits_BSV, output.logits, **CLOSE)


def test_a_state_does_not_see_the_tokens_after_it(teacher):
    changed_BS = TOKENS_BS.clone()
    changed_BS[:, 9:] = 0
    before, after = teacher.states_SBD(TOKENS_BS), teacher.states_SBD(changed_BS)
    torch.testing.assert_close(before[:9], after[:9], **CLOSE)
    assert (before[9:] - after[9:]).abs().max() > 1e-3


def test_loss_is_that_of_hugging_face(teacher, reference):
    tokens_BS, labels_BS = TOKENS_BS[:, :-1], TOKENS_BS[:, 1:]
    loss = teacher.lm_loss(tokens_BS, labels_BS, torch.ones(labels_BS.shape))
    assert loss == pytest.approx(reference[1].loss.item(), abs=1e-5)


def test_loss_leaves_masked_tokens_out(teacher):
    tokens_BS, labels_BS = TOKENS_BS[:, :-1], TOKENS_BS[:, 1:].clone()
    mask_BS = torch.ones(labels_BS.shape)
    mask_BS[:, 4:] = 0
    loss = teacher.lm_loss(tokens_BS, labels_BS, mask_BS)
    assert loss == pytest.approx(
        teacher.lm_loss(tokens_BS[:, :4], labels_BS[:, :4], mask_BS[:, :4]), abs=1e-5
    )


def test_states_need_no_head(teacher):
    before = teacher.states_SBD(TOKENS_BS)
    teacher.drop_head()
    assert torch.equal(teacher.states_SBD(TOKENS_BS), before)


def test_parameters_and_flops_are_those_of_the_weights(teacher, reference):
    model = reference[0]
    assert teacher.parameters == sum(weight.numel() for weight in model.parameters())
    matrices = sum(  # all of them stand in the layers: the tables and the head do not count
        weight.numel()
        for name, weight in model.named_parameters()
        if weight.dim() == 2 and (".layers." in name or ".h." in name)
    )
    attention = 2 * 2 * 2 * 48 * 64 / 2  # multiply and add, QK and AV, layers, width, half of 64
    assert teacher.forward_flops(10, 64) == 10 * (2 * matrices + attention)


def test_cpu_platform_does_not_change_what_a_teacher_computes(folder, teacher):
    """Its patched factories once kept Hugging Face from building a model on the meta device."""
    function = "tests.unit.teacher.platform:states_and_fingerprint"
    [(states_SBD, digest)] = run_distributed(function, 1, folder, TOKENS_BS.numpy())
    config = read_teacher_config(str(folder))
    assert digest == fingerprint(load_causal_lm(config, torch.float32, torch.device("cpu")))
    np.testing.assert_allclose(states_SBD, teacher.states_SBD(TOKENS_BS).numpy(), atol=1e-6)


def test_cpu_platform_leaves_the_meta_device_working():
    [devices] = run_distributed("tests.unit.teacher.platform:device_of_factories", 1)
    assert devices == {"inside": {"meta"}, "outside": "cpu"}


def test_a_loss_close_to_that_of_guessing_is_noticed():
    assert near_random(math.log(1000), 1000)
    assert near_random(0.95 * math.log(1000), 1000)
    assert not near_random(0.8 * math.log(1000), 1000)
