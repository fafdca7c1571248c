import pytest

from megatron_let.report.runs import read_run
from megatron_let.report.table import comparison_table, losses_table
from megatron_let.report.targets import compare_all


@pytest.fixture
def comparisons(run_with):
    runs = []
    for seed in (1, 2):
        runs.append(run_with([6.0, 5.0, 4.5, 4.0], seed=seed))
        # Crosses 4.0 at step 15 (seed 1) and 25 (seed 2).
        losses = [5.0, 3.0, 2.9, 2.8] if seed == 1 else [5.5, 5.0, 3.0, 2.6]
        runs.append(run_with(losses, method="let", seed=seed, flops_per_step=110.0))
    return compare_all(runs)


def cells(table: str, label: str, seed: str) -> list[str]:
    rows = [[c.strip() for c in line.split("|")[1:-1]] for line in table.splitlines()]
    return next(row[2:] for row in rows if row[:2] == [label, seed])


def test_every_seed_mean_and_range(comparisons, run_with):
    teacher_run = run_with([3.5, 3.0, 2.9, 2.8], seed=9, label="teacher", flops_per_step=30.0)
    table = comparison_table(comparisons, teacher_run)
    plain = ["4.000", "1.00", "1.00", "1.00", "1.00x", "-"]
    assert cells(table, "baseline", "1") == plain
    # 15 / 40, 15 * 110 / 4000; the teacher cost 1200 of the plain run's 4000.
    assert cells(table, "let", "1") == ["2.800", "0.38", "0.41", "0.38", "2.67x", "0.30"]
    assert cells(table, "let", "2") == ["2.600", "0.62", "0.69", "0.62", "1.60x", "0.30"]
    assert cells(table, "let", "mean") == ["2.700", "0.50", "0.55", "0.50", "2.00x", ""]
    assert cells(table, "let", "range") == [
        "2.600-2.800", "0.38-0.62", "0.41-0.69", "0.38-0.62", "1.60-2.67x", "",
    ]  # fmt: skip
    assert "40 steps, 4.00e+03 FLOPs, 80 s" in table


def test_a_seed_that_never_arrives_is_not_averaged_away(comparisons, run_with):
    plain, other = comparisons[0].run, comparisons[1].run
    runs = [plain, other]
    runs += [run_with([9.0, 9.0, 9.0, 9.0], method="salt", seed=1)]
    runs += [run_with([9.0, 9.0, 9.0, 3.0], method="salt", seed=2)]
    table = comparison_table(compare_all(runs))
    assert cells(table, "salt", "1")[1:] == ["never", "never", "never", "-", "not given"]
    assert cells(table, "salt", "mean")[1] == "1 of 2"
    assert cells(table, "salt", "range")[1] == "0.96-never"
    assert cells(table, "salt", "mean")[4] == "-"


def test_an_unfinished_run_says_so(comparisons, run_with):
    runs = [comparisons[0].run, run_with([5.0, 3.0], method="let", label="let, half")]
    assert "3.000 (step 20)" in comparison_table(compare_all(runs))


def test_fits_a_terminal_and_is_ascii(comparisons):
    table = comparison_table(comparisons)
    assert max(map(len, table.splitlines())) <= 100
    assert table.isascii()


def test_losses_for_the_same_spending(comparisons):
    table = losses_table(comparisons)
    plain = "4.000 (4.000-4.000)"
    assert cells(table, "baseline", "2") == [plain, plain, plain, "-"]
    # LET has 1100 FLOPs between evaluations: 4000 lie 700 / 1100 of the way from step 30 to 40.
    flops = "2.791 (2.745-2.836)"
    assert cells(table, "let", "2") == ["2.700 (2.600-2.800)", flops, "2.700 (2.600-2.800)", "-"]
    assert max(map(len, table.splitlines())) <= 100


def test_a_grown_run_is_no_plain_run_and_has_its_small_models_price(lines, write):
    start, valid, _ = lines
    plain = read_run(write(start(), valid(40, 3.0), folder="plain"))
    # Resumed without the flag: it is what it was.
    records = start(init_from="small"), valid(20, 2.9), start(20, init_from=None), valid(40, 2.5)
    grown = read_run(write(*records, folder="grown"))
    assert (grown.method, grown.label, grown.init_from) == ("growth", "growth", "small")
    again = start(init_from="small"), start(), valid(40, 3.0)  # died before its first checkpoint
    assert read_run(write(*again, folder="again")).method == "baseline"
    guided = start(method="let", teacher={"lm_loss": 3.0}), start(20, method="let"), valid(40, 2.5)
    assert read_run(write(*guided, folder="guided")).teacher_loss == 3.0
    both = start(init_from="small", method="let", teacher={"lm_loss": 3.0})
    assert read_run(write(both, valid(40, 2.5), folder="both")).label == "growth + let"
    teacher = read_run(write(start(), valid(40, 3.1, flops_per_step=50.0), folder="teacher"))
    table = comparison_table(compare_all([plain, grown]), teacher)
    row = next(line for line in table.splitlines() if line.startswith("| growth"))
    assert row.rstrip(" |").endswith("0.50")
    assert row.split("|")[4].strip() == "0.50"
