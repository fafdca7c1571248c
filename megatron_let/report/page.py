"""A comparison as one page of HTML that needs no network: curves, tables, what differs."""

import contextlib
import html
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from megatron_let.report.plot import SKIPPED_START, TEACHER_COLOUR, default_title, display, looks
from megatron_let.report.runs import Run, shared
from megatron_let.report.targets import Comparison, by_label, guided, verdict

AXES = {"steps": "iteration", "tokens": "tokens", "FLOPs": "flops", "seconds": "seconds"}
"""What a click puts on the x-axis, and the field of `Evaluation` that it is."""
LOGGED = ("let gradient cosine", "let gradient ratio", "let weight", "kd weight", "teacher loss")
"""What is drawn over the steps where a run has logged it."""
OF_A_START = frozenset(
    "save load rank local_rank iteration consumed_train_samples consumed_valid_samples "
    "data_cache_path kd_selected tensorboard_dir listener_states wandb_exp_name seed method_module "
    "teacher_row_tokens".split()
)
"""Arguments that say where a run lies, how far it is, or what it has measured."""
STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 70em; padding: 0 1em }
h1 { font-size: 1.3em } h2 { font-size: 1.1em; margin-top: 2em }
pre, td, th { font: 13px/1.4 ui-monospace, monospace } pre { overflow-x: auto }
td, th { padding: .1em .8em .1em 0; text-align: left; vertical-align: top; overflow-wrap: anywhere }
"""


def write_page(
    comparisons: Sequence[Comparison], path: Path, tables: str, teacher_loss: float | None = None
) -> Path:
    """Write the page of `compare_all`'s runs, with `tables`, a text, under the curves.

    Folders are made. `teacher_loss`: in nats a token, on the same validation set. Raises
    ImportError with the way out if plotly is missing.
    """
    title = default_title(comparisons)
    runs = [c.run for c in comparisons]
    figures = [_losses(comparisons, teacher_loss), *_logged(comparisons)]
    parts = [f"<h1>{html.escape(title)}</h1>"]
    for number, figure in enumerate(figures):
        parts.append(figure.to_html(full_html=False, include_plotlyjs=number == 0))
    for label, own in guided(comparisons).items():
        parts.append(f"<p>{html.escape(f'{display(label)}: {verdict(own, comparisons)}.')}</p>")
    parts += ["<h2>Costs and losses</h2>", f"<pre>{html.escape(tables)}</pre>"]
    rows = ("".join(f"<td>{html.escape(c)}</td>" for c in row) for row in differing(runs))
    table = "".join(f"<tr>{row}</tr>" for row in rows)
    parts += ["<h2>What differs in their settings</h2>", f"<table>{table}</table>"]
    head = f"<meta charset=utf-8><title>{html.escape(title)}</title><style>{STYLE}</style>"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"<!doctype html><html lang=en>{head}<body>{''.join(parts)}</body></html>\n")
    return path


def _figure(**layout: Any) -> Any:
    try:
        from plotly.graph_objects import Figure
    except ImportError as error:
        raise ImportError("the page needs plotly: pip install plotly") from error
    margin = {"l": 70, "r": 20, "t": 50, "b": 50}
    usual = {"template": "plotly_white", "hovermode": "x unified", "margin": margin}
    return Figure(layout=usual | layout)


def _losses(comparisons: Sequence[Comparison], teacher_loss: float | None) -> Any:
    """Each label's mean over the seeds and their range as a band, over any of `AXES`."""
    figure = _figure(height=520, yaxis_title="validation loss (nats a token)")
    xs: dict[str, list[list[float]]] = {name: [] for name in AXES}
    shown = [c.target_loss for c in comparisons]
    shown += [] if teacher_loss is None else [teacher_loss]
    groups = by_label(comparisons)
    for label, (colour, _) in looks(comparisons).items():
        points = shared([c.run for c in groups[label]])
        lows, highs = ([pick(e.loss for e in at) for at in points] for pick in (min, max))
        means = [fmean(e.loss for e in at) for at in points]
        for name, field in AXES.items():
            own = [fmean(getattr(e, field) for e in at) for at in points]
            xs[name] += [own, [*own, *reversed(own)]]
        shown += means[int(SKIPPED_START * len(means)) :]
        steps, band = xs["steps"][-2:]
        figure.add_scatter(x=steps, y=means, name=display(label), line={"color": colour})
        figure.add_scatter(
            x=band, y=[*highs, *reversed(lows)], fill="toself", fillcolor=colour, opacity=0.15,
            line={"width": 0}, showlegend=False, hoverinfo="skip",
        )  # fmt: skip
    if teacher_loss is not None:
        words = f"teacher's own loss ({teacher_loss:.2f})"
        figure.add_hline(
            teacher_loss, line_dash="dash", line_color=TEACHER_COLOUR, annotation_text=words
        )
    buttons = [
        {"label": name, "method": "update", "args": [{"x": x}, {"xaxis.title.text": name}]}
        for name, x in xs.items()
    ]
    place = {"type": "buttons", "direction": "right", "x": 0, "y": 1.12, "xanchor": "left"}
    figure.update_layout(xaxis_title="steps", updatemenus=[{"buttons": buttons, **place}])
    finite = [loss for loss in shown if math.isfinite(loss)]
    edge = 0.05 * (max(finite) - min(finite)) + 0.01
    figure.update_yaxes(range=[min(finite) - edge, max(finite) + edge])
    return figure


def _logged(comparisons: Sequence[Comparison]) -> Iterator[Any]:
    """A line for every run in its label's colour, over all steps of the run."""
    steps = [0.0, max(c.plain_total.steps for c in comparisons)]
    colours = {label: colour for label, (colour, _) in looks(comparisons).items()}
    for key in LOGGED:
        logged = [(c.run, points) for c in comparisons if (points := c.run.series(key))]
        if logged:
            xaxis = {"title": "steps", "range": steps}
            figure = _figure(height=260, xaxis=xaxis, yaxis_title=key, showlegend=True)
            for run, points in logged:
                x, y = zip(*points, strict=True)
                name, line = display(run.label), {"color": colours[run.label], "width": 1.5}
                is_first = name not in [trace.name for trace in figure.data]
                figure.add_scatter(
                    x=x, y=y, name=name, line=line, legendgroup=name, showlegend=is_first,
                    hovertemplate=f"{name}, seed {run.seed}: %{{y:.4g}}<extra></extra>",
                )  # fmt: skip
            yield figure


def differing(runs: Sequence[Run]) -> list[list[str]]:
    """Rows of the arguments in which the labels' first runs differ, the names of these first."""
    first = {run.label: run for run in reversed(runs)}
    found = {label: arguments_of(run) for label, run in reversed(first.items())}
    names = sorted(set().union(*found.values()) - OF_A_START)
    rows = [[name, *(str(own.get(name, "-")) for own in found.values())] for name in names]
    return [["", *found], *(row for row in rows if len(set(row[1:])) > 1)]


def arguments_of(run: Run) -> dict[str, Any]:
    """Those of a run's latest start to train; none where it kept no record."""
    starts = (run.path.parent / "starts").glob("*.json")
    for start in sorted(starts, key=lambda path: path.stat().st_mtime, reverse=True):
        with contextlib.suppress(KeyError, OSError, TypeError, ValueError):
            arguments = dict(json.loads(start.read_text())["arguments"])
            if not arguments.get("skip_train"):
                return arguments
    return {}
