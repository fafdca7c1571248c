import json

import pytest

from megatron_let.report.runs import read_run


def test_reads_every_field(write, lines):
    start, valid, train = lines
    teacher = {"name": "small", "parameters": 10, "fingerprint": "abc", "lm_loss": 3.1}
    folder = write(
        start(method="let", seed=7, teacher=teacher),
        train(10, lm_loss=5.0, let_loss=0.5),
        valid(20, 4.5),
        train(20, lm_loss=4.0),
    )
    run = read_run(folder)
    assert (run.method, run.label, run.seed, run.train_iters) == ("let", "let", 7, 40)
    assert run.teacher_loss == 3.1
    assert run.series("lm loss") == [(10, 5.0), (20, 4.0)]
    assert run.series("let loss") == [(10, 0.5)]
    assert run.series("kd loss") == []
    final = run.final
    assert (final.iteration, final.loss, final.flops, final.seconds) == (20, 4.5, 2000.0, 40.0)
    assert not run.finished
    assert read_run(folder / "metrics.jsonl", label="let, weight 3").label == "let, weight 3"


def test_a_folder_that_was_only_evaluated_is_no_finished_run(write, lines):
    start, valid, _ = lines
    assert not read_run(write(start(train_iters=None), valid(0, 5.0))).finished


def test_resume_drops_what_the_earlier_attempt_did_after_the_checkpoint(write, lines):
    start, valid, train = lines
    run = read_run(
        write(
            start(),
            valid(10, 5.0),
            valid(20, 4.0),
            train(25, lm_loss=9.0),
            valid(30, 9.0),
            start(20),  # resumed from the checkpoint at step 20: 25 and 30 never happened
            valid(35, 3.5),
            valid(40, 3.0),
        )
    )
    assert [(e.iteration, e.loss) for e in run.evaluations] == [
        (10, 5.0),
        (20, 4.0),  # the checkpoint's own step belongs to both attempts
        (35, 3.5),
        (40, 3.0),
    ]
    assert run.train == ()
    assert run.finished


def test_a_run_that_went_on_with_another_method_is_no_run_of_that_one(write, lines):
    start, valid, _ = lines
    first = [start(method="let"), valid(10, 5.0)]
    run = read_run(write(*first, start(20, method="baseline"), start(30, method="baseline")))
    assert run.method == run.label == "let, then baseline"
    evaluated = start(20, train_iters=None, tokens_per_step=None)  # --skip-train
    run = read_run(write(*first, evaluated))
    assert (run.method, run.train_iters, run.tokens_per_step) == ("let", 40, 8)
    run = read_run(write(*first, valid(40, 4.0), evaluated, valid(20, 4.5)))  # of its middle
    assert run.finished and [e.iteration for e in run.evaluations] == [10, 20, 40]
    assert read_run(write(*first, start(method="baseline"))).method == "baseline"  # begun anew


def test_last_record_of_a_step_wins(write, lines):
    start, valid, train = lines
    records = [start(), valid(10, 5.0), train(10, lm_loss=6.0), valid(10, 4.0)]
    run = read_run(write(*records))
    assert [e.loss for e in run.evaluations] == [4.0]
    assert run.series("lm loss") == [(10, 6.0)]  # same step, other kind: untouched


@pytest.mark.parametrize("kept", range(1, 60))
def test_torn_last_line_is_ignored_wherever_it_is_cut(write, lines, kept):
    start, valid, _ = lines
    torn = json.dumps(valid(20, 4.0))[:kept]
    assert [e.loss for e in read_run(write(start(), valid(10, 5.0), torn)).evaluations] == [5.0]


def test_torn_line_elsewhere_is_named_and_skipped(write, lines, capsys):
    start, valid, _ = lines
    folder = write(start(), '{"kind": "valid", "iter\n', "[1, 2]\n", valid(10, 5.0))
    assert [e.loss for e in read_run(folder).evaluations] == [5.0]
    said = capsys.readouterr().err
    assert "metrics.jsonl:2 is no record" in said and "metrics.jsonl:3 is no record" in said


def test_missing_empty_and_foreign_files_say_what_to_do(write, lines, tmp_path):
    start, valid, _ = lines
    with pytest.raises(ValueError, match="does not exist: give the folder"):
        read_run(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="a value was changed"):
        read_run(write(start(), valid(10, None)))
    with pytest.raises(ValueError, match="its run has not begun yet"):
        read_run(write(""))
    with pytest.raises(ValueError, match=r"^[^:]* has no start line"):
        read_run(write(valid(10, 5.0)))
    with pytest.raises(ValueError, match="lacks 'lm loss'"):
        read_run(write(start(), '{"kind": "valid", "iteration": 1, "tokens": 1, "flops": 1, '
                       '"seconds": 1}\n'))  # fmt: skip
    with pytest.raises(ValueError, match="no evaluation: run with --eval-interval"):
        _ = read_run(write(start())).final
