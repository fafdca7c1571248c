"""Scores against a loop in numpy, the choice, and what a user can get wrong."""

from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_let.commands.select_data import main
from megatron_let.data.selection import (
    SelectedFirst,
    Selection,
    difficulty_B,
    highest,
    load_selection,
    number_wanted,
)
from megatron_let.errors import UsageError
from megatron_let.selection import scoring
from megatron_let.selection.scoring import SelectConfig, number_of_candidates
from megatron_let.teacher.load import TokenIds


def written_out(logits, labels, mask, top_k):
    """Equation 10 token by token, the lower of two middle values."""
    losses = []
    for row, label, counts in zip(logits, labels, mask, strict=True):
        likeliest = np.argsort(-row)[:top_k]
        if counts and label in likeliest:
            losses.append(np.log(np.exp(row).sum()) - row[label])
    if len(losses) < 0.1 * mask.sum():
        return -np.inf
    return sorted(losses)[(len(losses) - 1) // 2]


@pytest.mark.parametrize("top_k", [1, 5, 20])
def test_difficulty_is_the_median_of_the_kept(top_k):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 30, 20, generator=generator)
    labels = torch.randint(0, 20, (6, 30), generator=generator)
    mask = (torch.rand(6, 30, generator=generator) > 0.3).float()
    found = difficulty_B(logits, labels, mask, top_k).numpy()
    arrays = (logits.double().numpy(), labels.numpy(), mask.numpy())
    expected = [written_out(*row, top_k) for row in zip(*arrays, strict=True)]
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_a_sample_beyond_the_scorers_reach_comes_last():
    logits = torch.zeros(2, 10, 5)
    logits[..., 0] = 9.0
    labels = torch.tensor([[1] * 10, [0] * 10])  # never the likeliest; always
    scores = difficulty_B(logits, labels, torch.ones(2, 10), top_k=1)
    assert scores[0] == -torch.inf and scores[1] < 0.1


def test_highest_are_kept_in_their_order_and_of_equal_ones_the_earlier():
    assert highest(np.array([1.0, 3.0, 2.0, 3.0, 2.0]), 3).tolist() == [1, 2, 3]


def test_selected_samples_come_first_and_then_the_stream():
    stream = SelectedFirst(list("abcdefgh"), np.array([2, 5]), number=5)
    assert len(stream) == 8
    assert "".join(stream[i] for i in range(8)) == "cfcfc" + "fgh"


@pytest.fixture
def kept(tmp_path):
    path = tmp_path / "selection.npz"
    chosen = {"samples": np.array([1, 4]), "beyond_reach": 0}
    Selection(data="d1", candidates=9, flops=2.5, **chosen).save(path)
    return path


def test_what_is_saved_is_loaded(kept):
    selection = load_selection(kept)
    selection.check("d1")
    assert selection.samples.tolist() == [1, 4]
    assert (selection.data, selection.candidates, selection.flops) == ("d1", 9, 2.5)


def test_a_selection_of_other_data_is_refused(kept):
    with pytest.raises(
        UsageError, match="was made from other training data.*d1.*d2.*megatron-let select"
    ):
        load_selection(kept).check("d2")


def test_no_selection(tmp_path, kept):
    (tmp_path / "text").write_text("words")
    (tmp_path / "cut").write_bytes(kept.read_bytes()[:-20])
    (tmp_path / "empty").touch()
    for name in ("nowhere", "text", "cut", "empty"):
        with pytest.raises(UsageError, match=f"{name} is no selection .*megatron-let select"):
            load_selection(tmp_path / name)


@pytest.mark.parametrize("fraction", [0.0, -0.5, 1.5])
def test_keep_fraction_outside(tmp_path, fraction):
    with pytest.raises(UsageError, match=rf"--keep-fraction {fraction} must be above 0 and at mo"):
        SelectConfig(output=tmp_path / "x", keep_fraction=fraction, scorer_model=None)


def test_nothing_is_overwritten(kept):
    with pytest.raises(UsageError, match="exists, and nothing is overwritten"):
        SelectConfig(output=kept.parent / "selection.npz", keep_fraction=0.5, scorer_model=None)


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_scores_that_are_no_numbers(tmp_path, monkeypatch, wrong):
    """One token's is enough: its median would leave it out, or be the highest."""
    scorer = object.__new__(scoring.Scorer)
    scorer.config = SelectConfig(output=tmp_path / "x", keep_fraction=1, scorer_model="bad")
    scorer.context, scorer._device, scorer._model = 3, torch.device("cpu"), None
    logits = torch.zeros(1, 3, 9)
    logits[0, 2, 4] = wrong
    monkeypatch.setattr(scoring, "logits", lambda *_: logits)
    sample = dict.fromkeys(("tokens", "labels", "loss_mask"), torch.ones(4, dtype=torch.long))
    with pytest.raises(UsageError, match="--scorer-model gives scores that are no numbers"):
        scorer.score([sample])


@pytest.mark.parametrize(
    "scorers, message",
    [(TokenIds({"a": 1}), "'a' is 0 .* and 1 in that of --scorer-model m"), (None, "has 4 rows")],
)
def test_a_scorer_of_another_tokenizer(monkeypatch, scorers, message):
    monkeypatch.setattr(scoring, "known_token_ids", lambda args: {"a": 0})
    monkeypatch.setattr(scoring, "read_token_ids", lambda name: scorers)
    monkeypatch.setattr(scoring, "read_teacher_config", lambda name: Namespace(vocab_size=4))
    monkeypatch.setattr(scoring, "get_tokenizer", lambda: Namespace(vocab_size=5))
    with pytest.raises(UsageError, match=message):
        scoring._check_tokens("m", run_flags())


def run_flags(**changes):
    values = {"kd_stop_step": 10, "global_batch_size": 8, "step_batch_size_schedule": None}
    return Namespace(**values | changes)


def test_candidates_are_as_many_as_the_kept_part_needs(tmp_path):
    config = SelectConfig(output=tmp_path / "x", keep_fraction=0.3, scorer_model=None)
    assert number_of_candidates(config, run_flags(), available=400) == 267
    with pytest.raises(UsageError, match="0.3 needs 267 samples to choose 80 from.*least 0.32,"):
        number_of_candidates(config, run_flags(), available=250)


def test_a_run_without_a_stop_has_no_selection():
    with pytest.raises(UsageError, match="first steps of --method salt"):
        number_wanted(run_flags(kd_stop_step=None))


def select_with(monkeypatch, tmp_path, check):
    """Select by a scorer whose scores are on another machine; `check` looks at its tokens."""
    monkeypatch.setattr(scoring, "_check_tokens", check)
    monkeypatch.setattr(scoring, "Scorer", lambda *_: Namespace(flops_per_sample=1.0))
    monkeypatch.setattr(scoring, "_score_all", lambda *_: [tmp_path / "0.npy"])
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    config = SelectConfig(output=tmp_path / "x", keep_fraction=1, scorer_model="m")
    scoring.select(config, run_flags(seq_length=4), range(99))


def test_scores_on_another_nodes_disk(monkeypatch, tmp_path):
    with pytest.raises(UsageError, match="0.npy is not here: another node has it"):
        select_with(monkeypatch, tmp_path, lambda *_: None)


def test_scores_of_other_tokens_are_not_gone_on_with(monkeypatch, tmp_path):
    """The mask is no part of a stream's hash."""
    for name, value in {"get_rank": 0, "get_world_size": 1, "barrier": None}.items():
        monkeypatch.setattr(torch.distributed, name, lambda value=value: value)
    config = SelectConfig(output=tmp_path / "x", keep_fraction=1, scorer_model="m")
    scored = Namespace(config=config, context=4, fingerprint="f", score=lambda s: np.zeros(len(s)))

    class Stream(list):
        unique_description_hash = "d"

    places = []
    for mask in (False, True, False):
        stream = Stream(range(9))
        stream.config = Namespace(eod_mask_loss=mask)
        places += scoring._score_all(scored, stream, 9)
    assert places[0] == places[2] != places[1] and all(map(Path.exists, places))


def test_a_scorer_is_called_by_its_flag(monkeypatch, tmp_path):
    def refuse(*_):
        raise UsageError("--teacher-model m is bad")

    with pytest.raises(UsageError, match="^--scorer-model m is bad"):
        select_with(monkeypatch, tmp_path, refuse)


def test_how_to_score_without_a_scorer(capsys):
    with pytest.raises(SystemExit):
        main("--keep-fraction 1 --output x --top-k 3".split())
    assert "--scorer-batch need --scorer-model" in capsys.readouterr().err
