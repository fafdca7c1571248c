import itertools
import struct

import pytest

from megatron_let.report.plot import default_title, plot_comparison
from megatron_let.report.targets import compare_all

pytest.importorskip("matplotlib")
from matplotlib.figure import Figure  # noqa: E402
from matplotlib.text import Text  # noqa: E402


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
    salt = run_with([6.0, 5.0, float("nan"), 4.8], method="salt", label=r"$\frac$")  # no formula
    path = plot_comparison(compare_all([plain, salt]), tmp_path / "report.png")
    assert png_size(path) == (1380, 600)


@pytest.mark.filterwarnings("error:Attempting to set identical")
def test_plain_training_alone_is_not_said_to_miss_its_own_end(run_with, tmp_path, monkeypatch):
    monkeypatch.setattr("megatron_let.report.plot._annotate_best", None)
    plot_comparison(compare_all([run_with([4.0], train_iters=10)]), tmp_path / "report.png")


@pytest.mark.parametrize("others", [1, 7], ids=["few labels", "many labels"])
def test_every_text_lies_inside_the_picture_and_on_no_other(
    run_with, tmp_path, monkeypatch, others
):
    drawn = []
    save = Figure.savefig
    keep = lambda figure, *args, **named: drawn.append(figure) or save(figure, *args, **named)  # noqa: E731
    monkeypatch.setattr(Figure, "savefig", keep)
    runs = [run_with([6.0, 5.0, 4.5, 4.0], seed=s) for s in (1, 2)]
    runs += [
        run_with(
            [5.0, *(loss + i / 9 for loss in (3.5, 3.2, 3.0))], method="let", seed=s, label=f"{i}"
        )
        for s in (1, 2)
        for i in range(others)
    ]
    plot_comparison(
        compare_all(runs), tmp_path / "report.png", teacher_loss=2.5, title="long " * 60
    )
    [figure] = drawn
    figure.draw_without_rendering()
    [axes] = figure.axes
    ticks = {*axes.get_xticklabels(which="both"), *axes.get_yticklabels(which="both")}
    texts = [text for text in figure.findobj(Text) if text.get_text().strip()]
    boxes = {
        t.get_text(): t.get_window_extent() for t in texts if t.get_visible() and t not in ticks
    }
    assert len(boxes) > 4 + others
    for words, box in boxes.items():
        assert figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1, words
        assert figure.bbox.y0 <= box.y0 and box.y1 <= figure.bbox.y1, words
    for (words, box), (other, further) in itertools.combinations(boxes.items(), 2):
        assert not box.overlaps(further), (words, other)
