"""The teacher's states and loss are Hugging Face's own; tolerance 1e-6 absolute, float32."""

import itertools
import math
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_let.errors import UsageError
from megatron_let.teacher import stage
from megatron_let.teacher.load import fingerprint, load_causal_lm, read_teacher_config
from megatron_let.teacher.stage import UNASKED, Teacher, near_random
from megatron_let.teacher.work import window_ends
from megatron_let.upstream.dry import ITEM
from tests.support.testing import ARCHITECTURES, run_distributed, save_tiny_teacher
from tests.support.zoo import tiny_model

VOCAB = 256
TOKENS_BS = torch.randint(0, VOCAB, (3, 17), generator=torch.Generator().manual_seed(0))
ROWS = {"tokens": TOKENS_BS}
CONTEXT = 128
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


class Reads(TorchDispatchMode):
    """Counts values that the host asks for."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is ITEM
        return func(*args, **(kwargs or {}))


def load(folder, context=CONTEXT, layer=None):
    config = read_teacher_config(str(folder))
    return Teacher(load_causal_lm(config, torch.float32, torch.device("cpu")), context, layer)


@pytest.fixture
def teacher(folder):
    return load(folder)


def test_a_pass_reads_nothing_on_the_host(folder, monkeypatch):
    """Some architectures look for padding in what they get, which waits for a GPU."""
    teacher = load(folder)
    with Reads() as found:
        teacher.states_BSD(ROWS)
        stage.logits(teacher._causal_lm, TOKENS_BS)
    assert not found.count
    monkeypatch.setattr(stage, "UNASKED", UNASKED[:1])
    with Reads() as found:
        teacher.states_BSD(ROWS)
    assert found.count == folder.name.startswith("gpt2")


def test_states_are_the_last_hidden_ones_after_the_final_norm(teacher, reference):
    states_BSD = teacher.states_BSD(ROWS)
    assert not states_BSD.requires_grad
    torch.testing.assert_close(states_BSD, reference[1].hidden_states[-1], **CLOSE)


def test_states_of_an_earlier_layer_need_no_later_one(folder, reference):
    teacher = load(folder, layer=1)
    flops = teacher.forward_flops(100, 10)
    teacher.keep_states_only()
    torch.testing.assert_close(teacher.states_BSD(ROWS), reference[1].hidden_states[1], **CLOSE)
    assert teacher.forward_flops(100, 10) == flops < load(folder).forward_flops(100, 10)


# --- windows and documents ---------------------------------------------------------------------


def test_windows_give_what_hugging_face_gives_for_each(folder, reference):
    """Contexts of 6: tokens 0 to 5, then 6 to 8 behind 3 to 5, and so on; the last ends the row."""
    states_BSD = load(folder, context=6).states_BSD(ROWS)
    model = reference[0].base_model
    with torch.no_grad():
        for end, new in ((6, 6), (9, 3), (12, 3), (15, 3), (17, 2)):
            window = model(TOKENS_BS[:, end - 6 : end]).last_hidden_state
            expected = window[:, 6 - new :]
            torch.testing.assert_close(states_BSD[:, end - new : end], expected, **CLOSE)


def test_windows_are_counted(folder):
    teacher = load(folder, context=6)
    assert len(window_ends(17, 6)) == 5 and len(window_ends(6, 6)) == 1
    assert teacher.forward_flops(17, 17) == pytest.approx(teacher.forward_flops(30, 6))


def documents(length, starts):
    """Positions and forbidden attention, as Megatron makes them for one packed row."""
    number = torch.zeros(length, dtype=torch.long)
    positions = torch.arange(length)
    for start in starts:
        number[start:] += 1
        positions[start:] = torch.arange(length - start)
    allowed = torch.ones(length, length).tril().bool() & (number[:, None] == number[None, :])
    return positions, ~allowed


def test_documents_kept_apart_are_read_as_if_alone(folder, reference):
    positions, forbidden = zip(
        documents(17, [5, 11]), documents(17, [3]), documents(17, []), strict=True
    )
    rows = ROWS | {
        "position_ids": torch.stack(positions),
        "attention_mask": torch.stack(forbidden)[:, None],
    }
    states_BSD = load(folder).states_BSD(rows)
    with torch.no_grad():
        for row, bounds in ((0, (0, 5, 11, 17)), (1, (0, 3, 17)), (2, (0, 17))):
            for start, end in itertools.pairwise(bounds):
                alone = reference[0].base_model(TOKENS_BS[row : row + 1, start:end])
                torch.testing.assert_close(
                    states_BSD[row : row + 1, start:end], alone.last_hidden_state, atol=1e-5, rtol=0
                )


def test_positions_alone_keep_nothing_apart(folder):
    """As in the student: what is attended to, a mask says."""
    positions, _ = documents(17, [5, 11])
    rows = ROWS | {"position_ids": positions.expand(3, 17)}
    causal = torch.ones(17, 17, dtype=torch.bool).triu(1).expand(3, 1, 17, 17)
    with_mask = load(folder).states_BSD(rows | {"attention_mask": causal})
    torch.testing.assert_close(load(folder).states_BSD(rows), with_mask, atol=1e-5, rtol=0)


def test_a_mask_alone_leaves_the_positions(folder):
    _, forbidden = documents(17, [5, 11])
    rows = ROWS | {"attention_mask": forbidden.expand(3, 1, 17, 17)}
    with_positions = rows | {"position_ids": torch.arange(17).expand(3, 17)}
    expected = load(folder).states_BSD(with_positions)
    assert torch.equal(load(folder).states_BSD(rows), expected)
    plain = load(folder).states_BSD(ROWS)
    torch.testing.assert_close(expected[:, :5], plain[:, :5], atol=1e-5, rtol=0)
    assert (expected[:, 5:] - plain[:, 5:]).abs().max() > 1e-3


def test_windows_and_documents_do_not_go_together(folder):
    rows = ROWS | {"position_ids": torch.arange(17).expand(3, 17)}
    with pytest.raises(ValueError, match="17 > 6 tokens"):
        load(folder, context=6).states_BSD(rows)


# --- loss, cost, platform ----------------------------------------------------------------------


def test_head_maps_the_states_to_the_logits(teacher, reference):
    """The states are what the head reads, so nothing lies between them and the prediction."""
    model, output = reference
    with torch.no_grad():
        logits_BSV = model.get_output_embeddings()(teacher.states_BSD(ROWS))
    torch.testing.assert_close(logits_BSV, output.logits, **CLOSE)


@pytest.mark.parametrize(
    "kind", "gemma2 gemma3_text recurrent_gemma xlstm cohere nanochat llama opt".split()
)
def test_a_head_that_caps_or_scales_is_refused_however_small_its_logits(kind):
    model = tiny_model(kind)
    if kind == "gemma3_text":
        model.config.final_logit_softcapping = 30.0
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(1e-3)
    refusal = pytest.raises(UsageError, match="scales or caps its logits")
    with nullcontext() if kind in ("llama", "opt") else refusal:
        Teacher(model, CONTEXT).head_rows(0, VOCAB)


def test_a_state_does_not_see_the_tokens_after_it(teacher):
    changed_BS = TOKENS_BS.clone()
    changed_BS[:, 9:] = 0
    before, after = teacher.states_BSD(ROWS), teacher.states_BSD({"tokens": changed_BS})
    torch.testing.assert_close(before[:, :9], after[:, :9], **CLOSE)
    assert (before[:, 9:] - after[:, 9:]).abs().max() > 1e-3


def test_loss_is_that_of_hugging_face(teacher, reference):
    tokens_BS, labels_BS = TOKENS_BS[:, :-1], TOKENS_BS[:, 1:]
    loss = teacher.lm_loss({"tokens": tokens_BS}, labels_BS, torch.ones(labels_BS.shape))
    assert loss == pytest.approx(reference[1].loss.item(), abs=1e-5)


def test_loss_leaves_masked_tokens_out(teacher):
    tokens_BS, labels_BS = TOKENS_BS[:, :-1], TOKENS_BS[:, 1:].clone()
    mask_BS = torch.ones(labels_BS.shape)
    mask_BS[:, 4:] = 0
    loss = teacher.lm_loss({"tokens": tokens_BS}, labels_BS, mask_BS)
    assert loss == pytest.approx(
        teacher.lm_loss({"tokens": tokens_BS[:, :4]}, labels_BS[:, :4], mask_BS[:, :4]), abs=1e-5
    )


def test_states_need_no_head(teacher):
    before = teacher.states_BSD(ROWS)
    teacher.keep_states_only()
    assert torch.equal(teacher.states_BSD(ROWS), before)


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


@pytest.mark.parametrize(
    "kind, matrices, width",
    [
        # Heads of 64 in a model of 32: queries and output, keys and values; a gated MLP.
        ("qwen3", 2 * (2 * 32 * 256 + 2 * 32 * 128 + 3 * 32 * 64), 256),
        # Two of four experts of 16, and what chooses them.
        ("qwen3_moe", 2 * (4 * 32 * 32 + 2 * 3 * 32 * 16 + 4 * 32), 32),
    ],
)
def test_flops_of_wide_heads_and_of_experts(kind, matrices, width):
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 256}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2 if kind == "qwen3" else 4}
    sizes |= {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2}
    config = AutoConfig.for_model(kind, head_dim=width // 4, **sizes)
    teacher = Teacher(AutoModelForCausalLM.from_config(config), CONTEXT)
    assert teacher.forward_flops(10, 64) == 10 * 2 * (matrices + 2 * 2 * width * 64 / 2)


def test_flops_of_layers_with_heads_of_their_own():
    pytest.importorskip("transformers.models.gemma4")
    model = tiny_model("gemma4_text")  # its configuration has no head_dim of all layers
    assert Teacher(model, CONTEXT).forward_flops(10, 64) > 10 * 2 * 2 * 32 * 64


def test_cpu_platform_does_not_change_what_a_teacher_computes(folder, teacher):
    """Its patched factories once kept Hugging Face from building a model on the meta device."""
    function = "tests.unit.teacher.platform:states_and_fingerprint"
    [(states_BSD, digest)] = run_distributed(function, 1, folder, TOKENS_BS.numpy())
    config = read_teacher_config(str(folder))
    assert digest == fingerprint(load_causal_lm(config, torch.float32, torch.device("cpu")))
    np.testing.assert_allclose(states_BSD, teacher.states_BSD(ROWS).numpy(), atol=1e-6)


def test_cpu_platform_leaves_the_meta_device_working():
    [devices] = run_distributed("tests.unit.teacher.platform:device_of_factories", 1)
    assert devices == {"inside": {"meta"}, "outside": "cpu"}


def test_a_loss_close_to_that_of_guessing_is_noticed():
    assert near_random(math.log(1000), 1000)
    assert near_random(0.95 * math.log(1000), 1000)
    assert not near_random(0.8 * math.log(1000), 1000)
