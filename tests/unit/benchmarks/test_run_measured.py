"""How steps are measured: whose turn it is, and where the host waits."""

from tests.support.testing import run_distributed

WORKER = "tests.unit.benchmarks.measuring"


def test_each_mode_has_as_many_steps_and_comes_first_in_turns():
    [(order, measured)] = run_distributed(f"{WORKER}:turns", 1, ["plain", "let", "salt"], 2)
    cycles = [order[i : i + 3] for i in range(0, len(order), 3)]
    assert all(sorted(cycle) == ["let", "plain", "salt"] for cycle in cycles)
    assert {cycle[0] for cycle in cycles} == {"plain", "let", "salt"}
    assert measured == {"plain": 2, "let": 2, "salt": 2}  # neither warming up nor counting waits


def test_waits_are_counted_by_who_waits_and_who_called():
    [found] = run_distributed(f"{WORKER}:waits_by_place", 1)
    assert sorted(found.values()) == [1, 2]
    assert all(place.count("measuring.py:") >= 1 for place in found)
    [twice] = [place for place, count in found.items() if count == 2]
    assert twice.count("measuring.py:") == 2  # the line in `wait`, and the one that called it
