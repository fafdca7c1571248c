"""A student's rows in a teacher's tokens: targets are where both have read the same text."""

import pickle
import random
from types import SimpleNamespace

import numpy as np
import pytest
import sentencepiece
import torch
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from megatron_let.data.tokenizer import HuggingFace, SentencePiece
from megatron_let.errors import UsageError
from megatron_let.translation.rows import NOTHING, TOKENS, Translated, Translator, cut, measure
from megatron_let.translation.token_bytes import TokenBytes
from megatron_let.upstream.batch import TEACHER_INDEX, TEACHER_TOKENS
from tests.support import tokenizers_of_ours as ours

TEXT = "The quick brown fox, aged 1,234, ran 56 km \u2014 na\u00efvely \U0001f30d \u4e16\u754c.\n"
PAIRS = [("gpt2", "digits"), ("digits", "gpt2"), ("gpt2", "llama2"), ("llama2", "gpt2")]
PAIRS += [("metaspace", "llama2"), ("llama2", "metaspace"), ("model", "metaspace")]


def token_bytes(tokenizer):
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=ours.END)
    return TokenBytes(HuggingFace(wrapped, (), True), "--teacher-model small")


@pytest.fixture(scope="module")
def forms(tmp_path_factory):
    made = {
        "gpt2": ours.byte_level(700),
        "digits": ours.byte_level(1500, digits=True),
        "llama2": ours.sentencepiece(900),
        "metaspace": ours.sentencepiece(1200, metaspace=True),
    }
    file = tmp_path_factory.mktemp("model") / "text"
    (file.parent / "text").write_text("\n".join(ours.texts()))
    sentencepiece.SentencePieceTrainer.train(
        input=str(file), model_prefix=str(file), vocab_size=1000, byte_fallback=True,
        character_coverage=0.98, normalization_rule_name="identity", model_type="unigram",
        remove_extra_whitespaces=False, minloglevel=2,
    )  # fmt: skip
    model = SentencePiece(f"{file}.model", (), legacy=False)
    found = {name: token_bytes(tokenizer) for name, tokenizer in made.items()}
    return found | {"model": TokenBytes(model, "--tokenizer-model text.model")}


def row_of(student, *documents):
    """Documents one after the other, each with its end."""
    ids = []
    for text in documents:
        ids += [*student.encode(text), student.tokenizer.eod]
    return np.array(ids)


def read(tokens, ids):
    """What the tokenizer's own decoder makes of the first 1, 2, ... tokens, without a first space.

    A decoder of SentencePiece's form takes that away.
    """
    own = tokens.tokenizer
    fast = own.fast
    starts = [[int(i) for i in ids[: n + 1]] for n in range(len(ids))]
    return [(fast.decode(s) if fast else own.detokenize(s)).lstrip(" ") for s in starts]


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_targets_are_where_the_decoders_say_the_same(forms, pair):
    student, teacher = (forms[name] for name in pair)
    translator, checked = Translator(student, teacher), 0
    for text in [*ours.texts()[0][:3000].split("\n\n"), TEXT, ours.UNICODE]:
        if not text.strip():
            continue
        ids = np.array(student.encode(text))
        row, index = translator.row(ids)
        of_teacher = read(teacher, row)
        for said, found in zip(read(student, ids), index, strict=True):
            if said and not said.endswith("\ufffd"):  # inside a character they cannot tell
                checked += 1
                places = [i for i, other in enumerate(of_teacher) if other == said]
                assert found == (places[-1] if places else NOTHING)
    assert checked > 300


def told(student, translator, fault=None):
    """Random edits: tokens before them whose target moved; edits that moved which have one."""
    dice, text = random.Random(0), (ours.texts()[2] + ours.UNICODE)[-6000:]
    told = moved = 0
    for _ in range(150):
        start, place = dice.randrange(len(text) - 200), dice.randrange(20, 110)
        one = text[start : start + 120]
        other = one[:place] + dice.choice("ae 1\n,\u00e9\u4e16") + one[place + dice.randrange(2) :]
        ids = [np.array(student.encode(text)) for text in (one, other)]
        same = next((i for i, (a, b) in enumerate(zip(*ids, strict=False)) if a != b), 0)
        (row_a, at_a), (row_b, at_b) = (translator.row(tokens) for tokens in ids)
        if fault is not None:
            at_a, at_b = (
                fault(student.lengths[tokens].cumsum(), translator.teacher.lengths[row].cumsum())
                for tokens, row in zip(ids, (row_a, row_b), strict=True)
            )
        has_a, has_b = (index[:same] != NOTHING for index in (at_a, at_b))
        for i in np.flatnonzero(has_a & has_b):
            told += row_a[: at_a[i] + 1].tolist() != row_b[: at_b[i] + 1].tolist()
        moved += bool((has_a != has_b).any())
    return told, moved


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_no_later_byte_moves_a_target(forms, pair):
    """Of a token that has one in both texts: what the teacher has read is the same."""
    student, teacher = (forms[name] for name in pair)
    found, moved = told(student, Translator(student, teacher))
    print(f"{'-'.join(pair)}: which tokens have a target moved in {moved} of 150 edits")
    assert not found
    assert moved < 75


def one_byte_off(ends, teacher_ends):
    at = teacher_ends.searchsorted(ends + 1)
    return np.where(np.append(teacher_ends, NOTHING)[at] == ends + 1, at, NOTHING)


def later_token(ends, teacher_ends):
    return teacher_ends.searchsorted(ends).clip(max=len(teacher_ends) - 1)


@pytest.mark.parametrize("fault", [one_byte_off, later_token])
def test_twins_tell_of_later_bytes(forms, fault):
    student, teacher = forms["gpt2"], forms["digits"]
    assert told(student, Translator(student, teacher), fault)[0] > 5


def test_words_that_end_elsewhere_tell_too(forms):
    """The twin of `settled`: white space is cut by what follows it."""
    student, teacher = forms["llama2"], forms["gpt2"]
    translator = Translator(student, teacher)
    translator._settled.flags = lambda ids, words: np.ones(len(ids), dtype=bool)
    assert told(student, translator)[0]


def test_a_long_piece_is_not_cut_inside_its_white_space(forms):
    """Behind sixteen words, where what hangs together is cut, the next word is tried with them."""
    student, teacher = forms["llama2"], forms["gpt2"]
    translator, start = Translator(student, teacher), "x=" + "a," * 13
    moved = 0
    for spaces in ("\n\t\t\t\t", "\n\n   ", "    "):
        rows = []
        for end in (spaces[-1] + "}", "}", "a", "\n"):
            ids = np.array(student.encode(start + spaces + end))
            rows.append((ids, *translator.row(ids)))
        for ids_a, row_a, at_a in rows:
            for ids_b, row_b, at_b in rows:
                for i in range(min(len(ids_a), len(ids_b))):
                    same = (ids_a[: i + 1] == ids_b[: i + 1]).all()
                    if same and at_a[i] != NOTHING and at_b[i] != NOTHING:
                        moved += row_a[: at_a[i] + 1].tolist() != row_b[: at_b[i] + 1].tolist()
    assert not moved


def test_text_without_spaces_costs_no_more_than_its_length(forms):
    """A piece is tried up to its 64th token: the rest has no target, and takes no time."""
    student, teacher = forms["llama2"], forms["gpt2"]
    dice = random.Random(0)
    ids = np.array(student.encode("".join(dice.choice("ACGT") for _ in range(20_000))))
    tried = []
    translator = Translator(student, teacher)
    encode = teacher.tokenizer.fast.encode_batch_fast
    fast = SimpleNamespace(
        encode_batch_fast=lambda texts, **how: (tried.extend(texts), encode(texts, **how))[1]
    )
    translator._settled._teacher = SimpleNamespace(
        join=teacher.join, tokenizer=SimpleNamespace(fast=fast)
    )
    _, index = translator.row(ids)
    assert 0 < len(tried) <= TOKENS
    assert 0 < (index != NOTHING).sum() < 80


def test_a_space_that_is_added_is_no_space_of_the_text(forms):
    """Behind U+2581, which its form has no token for, targets are lost; those before are right."""
    student, teacher = forms["gpt2"], forms["metaspace"]
    for text in ("  world \u2581 x", "       return x \u2581", "world \u2581 x"):
        ids = np.array(student.encode(text))
        row, index = Translator(student, teacher).row(ids)
        of_teacher = [t.replace("\u2581", " ") for t in read(teacher, row)]
        found = 0
        for said, at in zip(read(student, ids), index, strict=True):
            if at != NOTHING and said:
                found += 1
                assert of_teacher[at] == said
        assert found


def test_ids_that_pad_the_vocabulary_have_no_target(forms):
    student, teacher = forms["gpt2"], forms["digits"]
    text = student.encode("some text")
    _, index = Translator(student, teacher).row(np.array([*text, 5000, *text]))
    assert index[len(text)] == NOTHING
    assert (index[:2] != NOTHING).any() or (index[-2:] != NOTHING).any()


def test_a_copy_reads_as_the_first_one(forms):
    """A worker that is not forked gets one by pickle, which forgets how a tokenizer was set."""
    student, teacher = forms["gpt2"], forms["digits"]
    ids = np.array(student.encode(f"say {ours.END} now"))
    copy = pickle.loads(pickle.dumps(Translator(student, teacher)))
    for one, other in zip(copy.row(ids), Translator(student, teacher).row(ids), strict=True):
        assert one.tolist() == other.tolist()
    assert teacher.tokenizer.eod not in copy.row(ids)[0]


def test_tokens_are_not_drawn(forms):
    """Some tokenizers are kept as they were trained, with random cuts."""
    tokenizer = ours.byte_level(700)
    tokenizer.model.dropout = 0.9
    assert token_bytes(tokenizer).encode(TEXT) == forms["gpt2"].encode(TEXT)


def test_runs_of_spaces_that_were_added_are_spaces():
    """As in Gemma's: pieces of the vocabulary that are added tokens too, not special."""
    tokenizer = ours.sentencepiece(700)
    piece = max((piece for piece in tokenizer.get_vocab() if piece[0] == "\u2581"), key=len)
    tokenizer.add_tokens([AddedToken(piece, normalized=False)])
    index = tokenizer.token_to_id(piece)
    assert token_bytes(tokenizer).bytes[index] == b" " + piece[1:].encode()


def test_documents_are_read_apart_and_their_ends_meet(forms):
    student, teacher = forms["gpt2"], forms["llama2"]
    ids = row_of(student, "One text.", "Another, longer text.")
    row, index = Translator(student, teacher).row(ids)
    start = teacher.tokenizer.fast.token_to_id(ours.START)
    end = teacher.tokenizer.eod
    alone = [teacher.encode(text) for text in ("One text.", "Another, longer text.")]
    assert row.tolist() == [start, *alone[0], end, start, *alone[1], end]
    for place in np.flatnonzero(ids == student.tokenizer.eod):
        assert row[index[place]] == end
    assert row[index[-2]] == alone[1][-1]


def test_a_row_may_begin_and_end_inside_a_character(forms):
    student, teacher = forms["gpt2"], forms["digits"]
    whole = student.encode("\U0001f680 up \u4e16\u754c\U0001f680")
    assert len(student.encode("\U0001f680")) > 2
    ids = np.array(whole[1:-1])
    row, index = Translator(student, teacher).row(ids)
    text = " up \u4e16\u754c"
    assert teacher.join(row.tolist()).decode() == text
    ends = student.lengths[ids].cumsum() - (4 - student.lengths[whole[0]])
    inside = (ends > 0) & (ends <= len(text.encode()))
    assert not (index[~inside] != NOTHING).any()
    assert (index[inside] != NOTHING).any()


def test_special_tokens_have_no_text_and_no_target(forms):
    student, teacher = forms["llama2"], forms["gpt2"]
    start, text = student.tokenizer.fast.token_to_id(ours.START), student.encode("a text")
    row, index = Translator(student, teacher).row(np.array([*text, start, *text]))
    assert index[len(text)] == NOTHING
    assert teacher.join(row.tolist()) == b" a text a text"
    named = student.encode(f"say {ours.END}!")  # what a text calls so is text
    assert student.tokenizer.eod not in named
    row, _ = Translator(student, teacher).row(np.array(named))
    assert teacher.tokenizer.eod not in row


def test_what_a_tokenizer_normalizes_has_no_target_from_there_on(forms):
    tokenizer = ours.byte_level(700)
    tokenizer.normalizer = normalizers.NFC()
    student = forms["gpt2"]
    ids = np.array(student.encode("before cafe\u0301 behind"))
    _, index = Translator(student, token_bytes(tokenizer)).row(ids)
    ends = student.lengths[ids].cumsum()
    assert (index[ends <= 7] != NOTHING).any()
    assert not (index[ends > 10] != NOTHING).any()


def test_cut_rows_lose_their_last_targets():
    ids, index = np.arange(1, 9), np.array([0, NOTHING, 3, 7])
    longer, same = cut(ids, index, 10)
    assert longer.tolist() == [*range(1, 9), 0, 0]
    assert same.tolist() == index.tolist()
    shorter, fewer = cut(ids, index, 4)
    assert shorter.tolist() == [1, 2, 3, 4]
    assert fewer.tolist() == [0, NOTHING, 3, NOTHING]


def test_samples_with_the_teachers_rows(forms):
    student, teacher = forms["gpt2"], forms["llama2"]
    ids = torch.from_numpy(row_of(student, TEXT, TEXT))
    dataset = [{"tokens": ids, "loss_mask": torch.ones(len(ids))}] * 3
    translator = Translator(student, teacher)
    length, share = measure(dataset, translator, None)
    row, index = translator.row(ids.numpy())
    assert length % 16 == 0
    assert 1.1 * len(row) <= length < 1.1 * len(row) + 16
    assert share == pytest.approx((index != NOTHING).mean())
    samples = Translated(dataset, translator, length)
    assert len(samples) == 3
    assert TEACHER_INDEX in samples[0]
    assert samples[1]["loss_mask"] is dataset[0]["loss_mask"]
    assert samples[1][TEACHER_TOKENS].tolist() == [*row, *[0] * (length - len(row))]
    assert samples[1][TEACHER_INDEX].tolist() == index.tolist()
    before = samples[0]
    samples.stop()
    both = torch.utils.data.default_collate([before, samples[1]])  # a batch may hold both
    assert (both[TEACHER_INDEX][1] == NOTHING).all()
    assert not both[TEACHER_TOKENS][1].any()
    few = (index != NOTHING) & (index < 9)
    assert measure(dataset, translator, 9) == (9, pytest.approx(few.mean()))


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("lower case", "does not keep.*'The First.*'the first"),
        ("NFKC", "does not keep.*quoted"),
        ("words", "neither byte-level nor"),
    ],
)
def test_tokenizers_that_change_a_text_are_refused(kind, words):
    if kind == "words":
        tokenizer = Tokenizer(models.WordLevel({"a": 0, ours.END: 1}, unk_token=ours.END))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    else:
        tokenizer = ours.byte_level(400)
        tokenizer.normalizer = normalizers.NFKC() if kind == "NFKC" else normalizers.Lowercase()
    with pytest.raises(UsageError, match=words):
        token_bytes(tokenizer)
