import struct

import pytest

from megatron_let.report.plot import default_title, plot_comparison
from megatron_let.report.targets import compare_all

pytest.importorskip("matplotlib")


def png_size(path) -> tuple[int, int]:
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG")
    return struct.unpack(">II", data[16:24])


def test_readme_width(run_with, tmp_path):
    runs = [run_with([6.0, 5.0, 4.5, 4.0], seed=s) for s in (1, 2)]
    runs += [run_with([5.0, 3.5, 3.2, 3.0], method="let", seed=s) for s in (1, 2)]
    comparisons = compare_all(runs)
    path = plot_comparison(comparisons, tmp_path / "new" / "report.png", teacher_loss=2.5)
    assert png_size(path) == (1380, 600)
    assert default_title(comparisons) == (
        "LET against plain training: 100 student, 40 steps of 8 tokens, 2 seeds"
    )


def test_target_not_reached(run_with, tmp_path):
    plain = run_with([6.0, 5.0, 4.5, 4.0])
    salt = run_with([6.0, 5.0, float("nan"), 4.8], method="salt")
    path = plot_comparison(compare_all([plain, salt]), tmp_path / "report.png")
    assert png_size(path) == (1380, 600)


def test_nothing_to_plot(tmp_path):
    with pytest.raises(ValueError, match="nothing to plot"):
        plot_comparison([], tmp_path / "report.png")
