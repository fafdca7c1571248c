"""What stays of a run: a small file, committed, that is enough for every table and picture.

`docs/study/runs/NAME.jsonl` is the run's metrics.jsonl without what it logged between evaluations:
`megatron_let.report` reads it. Its `start` line also says how the run came about, and a last line
scores the finished model on both texts. The file appears complete or not at all.
"""

import hashlib
import json
import os
import platform
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_let.evaluation.perplexity import Document, score_text
from megatron_let.report.runs import Run, read_run

KEPT = ("kind", "iteration", "tokens", "flops", "seconds", "lm loss", "peak memory")
TEXTS = ("valid", "documentation")


@dataclass(frozen=True)
class Score:
    """The loss on a text."""

    nats_per_token: float
    bits_per_byte: float
    tokens: int
    bytes: int


@dataclass(frozen=True)
class Summary:
    """A finished run: what was logged, how it came about, and its scores."""

    run: Run
    facts: dict[str, Any]
    """The `start` line."""
    scores: dict[str, Score]
    """By text: `valid` (the domain of training), `documentation` (another)."""

    @property
    def loss(self) -> float:
        """Mean validation loss after the last step, nats a token."""
        return self.run.final.loss


def read_summary(path: Path) -> Summary:
    """Read one back. Raises ValueError if it is none."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    facts, last = lines[0], lines[-1]
    if last["kind"] != "score":
        raise ValueError(f"{path} does not end with a score: remove it, and run again")
    scores = {text: Score(**last[text]) for text in TEXTS}
    return Summary(read_run(path, label=facts["label"]), facts, scores)


def write_summary(path: Path, save: Path, facts: dict[str, Any], scores: dict[str, Score]) -> None:
    """Keep what matters of the finished run in `save`; `facts` join and replace the log's own."""
    run = read_run(save)
    log = [json.loads(line) for line in (save / "metrics.jsonl").read_text().splitlines()]
    start = next(line for line in reversed(log) if line["kind"] == "start")
    start |= {"iteration": 0, "tokens": 0, "flops": 0.0, "seconds": 0.0}
    if start["teacher"]:
        start["teacher"]["name"] = Path(start["teacher"]["name"]).name  # not where it lay
    evaluated = {line["iteration"]: line for line in log if line["kind"] == "valid"}
    lines = [start | _circumstances(save) | facts]
    lines += [{k: evaluated[e.iteration][k] for k in KEPT} for e in run.evaluations]
    last = {"kind": "score", "iteration": run.final.iteration}
    lines.append(last | {text: asdict(score) for text, score in scores.items()})
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text("".join(json.dumps(_rounded(line)) + "\n" for line in lines))
    partial.replace(path)


def _rounded(value: Any) -> Any:
    """Floats with as many digits as mean something, so that the record stays small."""
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return float(f"{value:.7g}") if isinstance(value, float) else value


def _circumstances(save: Path) -> dict[str, Any]:
    """The commit and versions of the run's last start."""
    start = json.loads(max((save / "starts").iterdir()).read_text())
    git = start["git"] or {"commit": None, "changed": []}
    changed = any(not line.startswith("??") for line in git["changed"])
    return {
        "commit": git["commit"],
        "changed": changed,
        "versions": start["versions"],
    }


def machine(with_gpu: bool) -> dict[str, Any]:
    """Which computer this is: seconds compare within one only."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    model = (models or [platform.processor() or platform.machine()])[0]
    gpu = torch.cuda.get_device_name() if with_gpu else None
    identity = f"{platform.node()} {model} {os.cpu_count()}" + f" {gpu}" * with_gpu
    short = hashlib.sha256(identity.encode()).hexdigest()[:8]
    return {"id": short, "cpu": model, "cores": os.cpu_count(), "gpu": gpu}


# --- scores -------------------------------------------------------------------------------------


def score_model(folder: Path, texts: dict[str, Path], context: int) -> dict[str, Score]:
    """Score an exported model on `.jsonl` files of documents, by name of the text."""
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, trust_remote_code=False
    ).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    found = score_text(
        model,
        tokenizer,
        _documents(texts),
        context=context,
        stride=context // 2,
        batch_size=64,
    )
    return {
        text: Score(s.loss / s.tokens, s.bits_per_byte, s.tokens, s.bytes)
        for text, s in found.items()
    }


def _documents(texts: dict[str, Path]) -> Iterator[Document]:
    for name, path in texts.items():
        with path.open(encoding="utf-8") as file:
            for line in file:
                yield Document(name, json.loads(line)["text"])
