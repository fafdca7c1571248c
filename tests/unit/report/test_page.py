"""The page of a comparison: what it says, and that a browser runs it."""

import json
import os
import re
import shutil
import subprocess

import pytest

from megatron_let.report.page import arguments_of, differing, write_page
from megatron_let.report.runs import read_run
from megatron_let.report.targets import compare_all, verdict

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
CLICK = """
<script>setTimeout(() => {
  const plot = document.querySelector('.plotly-graph-div');
  const said = () => [plot.layout.xaxis.title.text, Array.from(plot.data[2].x)];
  const before = said();
  document.querySelectorAll('g.updatemenu-button')[2].dispatchEvent(new MouseEvent('click'));
  setTimeout(() => {
    const pre = document.createElement('pre');
    pre.id = 'found'; pre.textContent = JSON.stringify([before, said()]);
    document.body.append(pre);
  }, 500);
}, 500)</script>
"""


@pytest.fixture
def runs(write, lines):
    """Two seeds of plain training and of LET, which logs its cosine; LET's ends differ by 0.4."""
    start, valid, train = lines
    found = []
    for method, ends in (("baseline", (4.0, 4.2)), ("let", (3.0, 3.4))):
        for seed, end in enumerate(ends, start=1):
            records = [valid(10 * k, loss) for k, loss in ((1, 6.0), (2, 5.0), (4, end))]
            own = [] if method == "baseline" else [train(10, let_gradient_cosine=0.1)]
            teacher = None if method == "baseline" else {"name": "<s>", "lm_loss": 3.0}
            first = start(method=method, seed=seed, data="d", teacher=teacher)
            folder = write(first, *own, *records, folder=f"{method}-{seed}")
            (folder / "starts").mkdir()
            settings = {"let_weight": 0.1 * (method == "let"), "lr": 1e-3, "save": str(folder)}
            (folder / "starts" / "a.json").write_text(json.dumps({"arguments": settings}))
            found.append(read_run(folder))
    return found


def test_the_page_says_it_all(runs, tmp_path):
    page = write_page(compare_all(runs), tmp_path / "new" / "page.html", "a < b", 3.0)
    text = page.read_text()
    body = text[text.rindex("</script>") :]
    assert "LET: better than every plain run (2 and 2 seeds)." in body
    assert "<pre>a &lt; b</pre>" in body
    assert "<td>let_weight</td><td>0.0</td><td>0.1</td>" in body and "<td>lr</td>" not in body
    assert "let gradient cosine" in text and "teacher loss" not in body
    assert not re.search(r"<(script|link)[^>]+(src|href)=", text)  # nothing from a network


def test_one_seed_has_no_range(runs):
    compared = [c for c in compare_all(runs) if c.run.seed == 1]
    assert verdict(compared[1:], compared) == "better than every plain run (one seed: no range)"


@pytest.mark.parametrize(("end", "word"), [(4.1, "within noise"), (4.3, "worse than every plain")])
def test_other_verdicts(runs, write, lines, end, word):
    start, valid, _ = lines
    folder = write(
        start(method="salt", seed=1, data="d", teacher={"lm_loss": 3.0}), valid(40, end), folder="s"
    )
    compared = compare_all([*runs[:2], read_run(folder)])
    assert word in verdict(compared[2:], compared)


def test_a_run_without_a_record_differs_in_nothing(runs):
    shutil.rmtree(runs[0].path.parent / "starts")
    assert ["lr", "-", "0.001"] in differing(runs)


def test_a_later_evaluation_by_itself_is_no_start_of_the_training(runs):
    folder = runs[0].path.parent / "starts"
    (folder / "b.json").write_text(json.dumps({"arguments": {"skip_train": True, "lr": 1.0}}))
    os.utime(folder / "b.json", (2e9, 2e9))
    assert arguments_of(runs[0])["lr"] == 1e-3


def test_seeds_that_were_evaluated_at_other_steps(write, lines, tmp_path):
    start, valid, _ = lines
    first = read_run(write(start(), valid(40, 4.0), folder="1"))
    second = read_run(write(start(seed=2, train_iters=30), valid(30, 4.0), folder="2"))
    assert write_page(compare_all([first, second]), tmp_path / "page.html", "").exists()


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_a_browser_shows_it_and_the_axis_switches(runs, tmp_path):
    page = write_page(compare_all(runs), tmp_path / "page.html", "tables")
    page.write_text(page.read_text().replace("</body>", f"{CLICK}</body>"))
    flags = "--headless=new --no-sandbox --disable-gpu --enable-logging=stderr".split()
    done = subprocess.run(
        [CHROMIUM, *flags, "--virtual-time-budget=5000", "--dump-dom", page.as_uri()],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    assert "CONSOLE" not in done.stderr
    found = re.search(r'<pre id="found">(.*?)</pre>', done.stdout)
    assert found, done.stdout[-500:]
    (title, steps), (after, flops) = json.loads(found[1])
    assert (title, after) == ("steps", "FLOPs")
    assert steps == [10, 20, 40] and flops == [1000, 2000, 4000]
