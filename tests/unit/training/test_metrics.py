import pytest

from megatron_let.report.runs import read_run
from megatron_let.training.metrics import MetricsFile

FACTS = {
    "name": "a run",
    "method": "baseline",
    "seed": 1,
    "train_iters": 6,
    "tokens_per_step": 100,
    "student_parameters": 10,
    "teacher": None,
    "flops_per_token": {"student": 6.0, "teacher": 0.0},
}


def train(path, *, start=0, stop):
    """Steps `start + 1` to `stop`, each 100 tokens and 600 FLOPs, evaluated every second step."""
    file = MetricsFile(path, start)
    file.write("start", start, **FACTS)
    for step in range(start + 1, stop + 1):
        file.add_step(100, 600.0)
        file.write("train", step, **{"lm loss": 10.0 - step})
        if step % 2 == 0:
            file.write("valid", step, **{"lm loss": 20.0 - step})
    return file


def test_report_reads_what_is_written(tmp_path):
    path = tmp_path / "metrics.jsonl"
    train(path, stop=6)
    run = read_run(tmp_path)
    assert (run.name, run.seed, run.train_iters, run.finished) == ("a run", 1, 6, True)
    assert run.series("lm loss") == [(step, 10.0 - step) for step in range(1, 7)]
    assert [(e.iteration, e.loss, e.tokens, e.flops) for e in run.evaluations] == [
        (step, 20.0 - step, 100 * step, 600.0 * step) for step in (2, 4, 6)
    ]


def test_totals_go_on_from_the_resumed_step_and_not_from_the_last_record(tmp_path):
    path = tmp_path / "metrics.jsonl"
    first = train(path, stop=5)  # killed after step 5; the last checkpoint is that of step 4
    resumed = train(path, start=4, stop=6)
    assert (resumed.totals["tokens"], resumed.totals["flops"]) == (600, 3600.0)
    assert resumed.totals["seconds"] > 0
    run = read_run(path)
    assert [e.tokens for e in run.evaluations] == [200, 400, 600]
    assert run.series("lm loss") == [(step, 10.0 - step) for step in range(1, 7)]
    assert run.series("tokens")[-1] == (6, 600)
    assert first.totals["tokens"] == 500


def test_an_evaluation_counts_that_an_earlier_start_has_made(tmp_path):
    """A complete run, started again, would put another one, of other rows, in its place."""
    path = tmp_path / "metrics.jsonl"
    train(path, stop=4)
    assert MetricsFile(path, 4).is_evaluated
    assert not MetricsFile(path, 3).is_evaluated
    MetricsFile(path, 4).write("start", 4, **FACTS)
    assert MetricsFile(path, 4).is_evaluated
    train(path, start=2, stop=3)  # from a checkpoint before it
    assert not MetricsFile(path, 4).is_evaluated


def test_a_run_from_the_first_step_counts_from_zero_although_the_file_is_there(tmp_path):
    path = tmp_path / "metrics.jsonl"
    train(path, stop=3)
    assert train(path, stop=2).totals["tokens"] == 200


def test_a_torn_last_line_is_cut_before_the_next_record(tmp_path):
    path = tmp_path / "metrics.jsonl"
    train(path, stop=4)
    whole = path.read_text()
    path.write_text(whole + '{"kind": "train", "iterat')
    train(path, start=4, stop=6)
    assert path.read_text().startswith(whole + '{"kind": "start"')
    assert read_run(path).finished


@pytest.mark.parametrize(
    "bad",
    [
        b'{"kind": "train", "iterat',
        b"\0\xff\xfe rubbish \r \x85",
        b"[1, 2]",
        b"3",
        b'{"kind": "train"}',
        b'{"iteration": 3}',
        b'{"kind": "train", "iteration": Infinity}',
        b"[" * 100_000,
    ],
)
@pytest.mark.parametrize("place", [0, 1, 4])
def test_a_line_that_is_no_record_is_said_and_skipped(bad, place, tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    train(path, stop=4)
    whole = path.read_bytes().splitlines(keepends=True)
    spoilt = b"".join([*whole[:place], bad + b"\n", *whole[place:]])
    path.write_bytes(spoilt)
    resumed = train(path, start=4, stop=6)
    assert f"metrics.jsonl:{place + 1} is no record" in capsys.readouterr().err
    assert resumed.totals["tokens"] == 600
    assert path.read_bytes().startswith(spoilt + b'{"kind": "start"')
    assert read_run(path).series("tokens") == [(step, 100 * step) for step in range(1, 7)]


@pytest.mark.parametrize("torn", ["", '{"kind": "st'])
def test_a_file_without_a_whole_line_starts_anew(torn, tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(torn)
    train(path, stop=6)
    assert read_run(path).finished


def test_time_of_evaluation_is_left_out(tmp_path, monkeypatch):
    clock = iter([0.0, 1.0, 100.0, 102.0]).__next__
    monkeypatch.setattr("megatron_let.training.metrics.time.perf_counter", clock)
    file = MetricsFile(None, 0)
    file.add_step(1, 1.0)  # one second
    file.restart_clock()  # 99 seconds of evaluation
    file.add_step(1, 1.0)  # two seconds
    assert file.totals["seconds"] == 3.0


def test_other_ranks_count_and_write_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert train(None, stop=3).totals["tokens"] == 300
    assert list(tmp_path.iterdir()) == []
