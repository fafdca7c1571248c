"""Every token counts once, and the sum is what a loop over the text gives."""

import math

import pytest
import torch
import torch.nn.functional as F

from megatron_let.errors import UsageError
from megatron_let.evaluation.perplexity import Document, TextScore, score_text, windows
from megatron_let.evaluation.results import text_table
from tests.unit.conversion.hf_models import make_model, write_tokenizer

TOLERANCE = 1e-6  # relative, of a summed loss: float32 logits on both sides, in other batches


@pytest.mark.parametrize("length", [0, 1, 2, 7, 8, 9, 10, 33])
@pytest.mark.parametrize(("context", "stride"), [(8, 8), (8, 4), (8, 3), (5, 1), (1, 1)])
def test_every_token_is_predicted_once(length: int, context: int, stride: int) -> None:
    ids = list(range(length))
    predicted: list[int] = []
    for window in windows("", ids, context, stride):
        assert 1 <= len(window.ids) - 1 <= context and window.scored >= 1
        assert window.ids == ids[window.ids[0] : window.ids[-1] + 1]
        predicted += window.ids[-window.scored :]
        # Behind the first window, everything scored has seen what the stride leaves.
        if window.ids[0] > 0:
            assert len(window.ids) - 1 - window.scored >= context - stride
    assert predicted == ids[1:]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    from megatron_let.conversion.tokenizer_files import load_tokenizer

    return load_tokenizer(write_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def documents() -> list[Document]:
    generator = torch.Generator().manual_seed(0)
    made = []
    for i, length in enumerate([3, 80, 1, 0, 33, 200, 5, 64]):
        ids = torch.randint(2, 300, (length,), generator=generator).tolist()
        made.append(Document("ab"[i % 2], " ".join(f"w{j}" for j in ids)))
    return made


def reference(model, tokenizer, text: str, context: int, stride: int) -> tuple[float, int]:
    """The textbook's loop: one window at a time, the tokens seen before masked with -100."""
    ids = torch.tensor([[tokenizer.eos_token_id, *tokenizer(text)["input_ids"]]])
    total, count, seen = 0.0, 0, 1
    for start in range(0, ids.shape[1], stride):
        end = min(start + context + 1, ids.shape[1])
        if end <= seen:
            break
        window = ids[:, start:end]
        labels = window.clone()
        labels[:, : seen - start] = -100
        with torch.no_grad():
            logits = model(window[:, :-1]).logits
        loss = F.cross_entropy(logits[0], labels[0, 1:], reduction="sum", ignore_index=-100)
        total, count, seen = total + loss.item(), count + int((labels[0, 1:] >= 0).sum()), end
    return total, count


@pytest.mark.parametrize("stride", [32, 7])
def test_agrees_with_the_textbook(tokenizer, stride: int) -> None:
    model, context = make_model("llama"), 32
    scores = score_text(model, tokenizer, documents(), context=context, stride=stride, batch_size=3)
    for subset in "ab":
        texts = [document.text for document in documents() if document.subset == subset]
        expected = [reference(model, tokenizer, text, context, stride) for text in texts]
        score = scores[subset]
        assert score.tokens == sum(count for _, count in expected)
        assert score.tokens == sum(len(text.split()) for text in texts)
        assert score.bytes == sum(len(text.encode()) for text in texts)
        assert score.documents == len(texts)
        loss = sum(loss for loss, _ in expected)
        assert score.loss == pytest.approx(loss, rel=TOLERANCE)
        assert score.perplexity == pytest.approx(math.exp(loss / score.tokens), rel=1e-5)
        assert score.bits_per_byte == pytest.approx(loss / math.log(2) / score.bytes, rel=1e-5)


def test_what_the_comparison_catches(tokenizer) -> None:
    """Twins: windows without a past, and another context, give another loss."""
    model = make_model("llama")
    text = documents()[5]
    loss, _ = reference(model, tokenizer, text.text, 32, 16)
    for context, stride in ((32, 32), (24, 16)):
        scores = score_text(model, tokenizer, [text], context=context, stride=stride, batch_size=3)
        score = scores[text.subset]
        assert score.loss != pytest.approx(loss, rel=100 * TOLERANCE)


def test_a_document_without_a_start(tokenizer) -> None:
    """Without a token to begin with the first one is not scored, and not counted."""
    tokenizer = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer)
    texts = [Document("a", "w5 w6 w7"), Document("a", "")]
    scores = score_text(make_model("gpt2"), tokenizer, texts, context=32, stride=16, batch_size=3)
    assert (scores["a"].tokens, scores["a"].bytes) == (2, len(" w6 w7"))


def test_a_tokenizer_of_another_model(tokenizer) -> None:
    model = make_model("gpt2")
    model.resize_token_embeddings(100)
    with pytest.raises(UsageError, match="gives the id 299 and the model has 100 rows"):
        score_text(model, tokenizer, [Document("", "w299")], context=8, stride=8, batch_size=1)


def test_an_end_token_that_the_model_has_not(tokenizer) -> None:
    model = make_model("gpt2")
    model.resize_token_embeddings(tokenizer.eos_token_id)
    with pytest.raises(UsageError, match="put the tokenizer of its training beside it"):
        score_text(model, tokenizer, [Document("", "")], context=8, stride=8, batch_size=1)


def test_a_damaged_model_has_no_loss(tokenizer) -> None:
    model = make_model("gpt2")
    model.transformer.ln_f.weight.data[0] = math.nan
    with pytest.raises(UsageError, match="NaN: .* --dtype float32 helps"):
        score_text(model, tokenizer, [Document("", "w5")], context=8, stride=8, batch_size=1)


def test_table() -> None:
    scores = {
        "plain": {"b": TextScore(2, 10, 40, 30.0), "a": TextScore(1, 5, 20, 10.0)},
        "let": {"b": TextScore(2, 12, 40, 29.0), "a": TextScore(1, 6, 20, 9.0)},
    }
    *lines, _, note = text_table(scores).splitlines()
    assert note.endswith("compare the bits.")
    assert [line.split("|")[1].strip() for line in lines[2:]] == ["a", "b", "all"]
    cells = [cell.strip() for cell in lines[-1].split("|")]
    plain = f"{math.exp(40 / 15):.3f}, {40 / math.log(2) / 60:.4f}"
    let = f"{math.exp(38 / 18):.3f}, {38 / math.log(2) / 60:.4f}"
    assert cells[1:6] == ["all", "3", "0.00", plain, let]
    assert TextScore(1, 1, 1, 1e4).perplexity == math.inf
    assert len(text_table({"one": {"": TextScore(1, 5, 20, 10.0)}}).splitlines()) == 3
