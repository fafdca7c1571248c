"""What `gpu.py` found, as a page and as a row of docs/tested_on.md; and what it missed."""

import datetime
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from benchmarks.bootstrap import bounds

PAGE = "docs/tested_on.md"
NO_GPU_YET = "No GPU run yet.\n"
"""Stands on the page until its first row of a GPU."""
MAX_OVERHEAD, MAX_MEMORY = 0.04, 0.05
GIB = 1024**3
PEAK_TFLOPS = {"H100 PCIe": 756, "H100": 989, "H200": 989, "A100": 312, "B200": 2250}
"""Of bf16 matrix products without sparsity, by a part of the GPU's name; the first that fits."""
NAMES = {"baseline": "plain", "let": "LET", "salt": "SALT"}
PLACES = 3
"""Places where the teacher makes the host wait that are shown for each method."""


@dataclass(frozen=True)
class Results:
    """By a part's name what it found, or why it found nothing."""

    found: dict[str, dict[str, Any]]
    failed: dict[str, str]

    def ranks(self) -> dict[str, dict[str, Any]]:
        """The single ranks of recipes."""
        return {name: found for name, found in self.found.items() if " rank " in name}

    def whole(self) -> dict[str, dict[str, Any]]:
        """The whole student, by method."""
        return {n.split()[-1]: found for n, found in self.found.items() if " whole " in n}


# --- figures -----------------------------------------------------------------------------------


def overhead(found: dict[str, Any], mode: str) -> np.ndarray:
    """A mode's steps over the plain ones of the same cycle, less one; 0.1 is a tenth longer."""
    times = found["milliseconds"]
    return np.array(times[mode]) / np.array(times["baseline"]) - 1


def recipe_overhead(ranks: dict[str, dict[str, Any]], mode: str) -> dict[str, float]:
    """Of each recipe, whose step lasts as long as the slowest of its ranks'."""
    sizes = dict.fromkeys(name.split()[0] for name in ranks)
    slowest = {
        (size, timed): max(
            median(found["milliseconds"][timed])
            for name, found in ranks.items()
            if name.startswith(f"{size} ")
        )
        for size in sizes
        for timed in ("baseline", mode)
    }
    return {size: slowest[size, mode] / slowest[size, "baseline"] - 1 for size in sizes}


def peak_bytes(found: dict[str, Any], mode: str) -> int:
    """What a run of this method alone would hold: in turns the teacher stays in memory."""
    return found["peak_bytes"][mode] - found["teacher_bytes"] * (not found["with_teacher"][mode])


def off_plan(found: dict[str, Any], mode: str) -> float:
    """The peak over the planned one, less one."""
    return peak_bytes(found, mode) / found["planned_bytes"][mode] - 1


def tokens_per_second(found: dict[str, Any]) -> float:
    """Of the median step of a run with one mode."""
    [times] = found["milliseconds"].values()
    return 1e3 * found["tokens_per_step"] / median(times)


def mfu(found: dict[str, Any], device: str) -> float | None:
    """The student's FLOPs over the peak; None on a device whose peak is not known here."""
    peak = next((tflops for name, tflops in PEAK_TFLOPS.items() if name in device), None)
    return peak and tokens_per_second(found) * found["flops_per_token"] / (peak * 1e12)


def misses(results: Results) -> list[str]:
    """The targets that were not met, a sentence each."""
    missed = [
        f"{size}: LET makes a step {share:.1%} longer, not {MAX_OVERHEAD:.0%}"
        for size, share in recipe_overhead(results.ranks(), "let").items()
        if share > MAX_OVERHEAD
    ]
    for name, found in results.found.items():
        for mode in found.get("planned_bytes", {}):
            if abs(share := off_plan(found, mode)) > MAX_MEMORY:
                missed.append(f"{name}: the peak of {NAMES[mode]} is {share:+.1%} off the plan")
    return missed


# --- the page ----------------------------------------------------------------------------------


def page(results: Results, missed: list[str], here: dict[str, Any]) -> str:
    """All of it, on a screen."""
    lines = [f"\n{here['device']}, commit {here['commit']}", software(here)]
    lines += [f"tests: {results.found['tests']['summary']}"] if "tests" in results.found else []
    lines += _ranks(results.ranks())
    lines += _whole(results.whole(), here["device"])
    lines += [f"FAILED {name}: {reason[:160]}" for name, reason in results.failed.items()]
    lines += [f"MISSED {sentence}" for sentence in missed]
    return "\n".join([*lines, f"gpu.py: {verdict(results, missed)}"])


def software(here: dict[str, Any]) -> str:
    """The versions, one after the other."""
    names = ("Python", "torch", "CUDA", "megatron-core", "transformers", "Transformer Engine")
    return ", ".join(f"{name} {here[name]}" if here[name] else f"no {name}" for name in names)


def _ranks(ranks: dict[str, dict[str, Any]]) -> list[str]:
    if not ranks:
        return []
    heads = ["one rank, alone", "batch", "plain, ms", "LET, % more", "SALT, % more", "host waits"]
    lines = _aligned([heads, *(_times(name, found) for name, found in ranks.items())])
    lines.append(
        "(micro-batches x rows; 95 % intervals; waits of a plain step, and LET's and SALT's)"
    )
    for mode in ("let", "salt"):
        shares = recipe_overhead(ranks, mode).items()
        said = ", ".join(f"{size} {share:+.1%}" for size, share in shares)
        lines.append(f"{NAMES[mode]} by the slowest of a recipe's ranks: {said}")
        lines += [f"  waits {count} x {place}" for place, count in _added(ranks, mode)]
    if any(any(found["peak_bytes"].values()) for found in ranks.values()):
        heads = ["peak GiB (off the plan)", *NAMES.values()]
        lines += _aligned([heads, *([name, *_peaks(found)] for name, found in ranks.items())])
    return lines


def _aligned(rows: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(c.rjust(w) for c, w in zip(row, widths, strict=True)) for row in rows]


def _times(name: str, found: dict[str, Any]) -> list[str]:
    cells = [name, f"{found['micro_batches']} x {found['micro_batch_size']}"]
    cells.append(f"{median(found['milliseconds']['baseline']):.1f}")
    for mode in ("let", "salt"):
        low, high = bounds(ratios := overhead(found, mode))
        cells.append(f"{100 * np.median(ratios):+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]")
    waits = {mode: sum(places.values()) for mode, places in found["waits"].items()}
    plain = waits["baseline"]
    return [*cells, f"{plain} {waits['let'] - plain:+d} {waits['salt'] - plain:+d}"]


def _peaks(found: dict[str, Any]) -> list[str]:
    return [
        f"{peak_bytes(found, mode) / GIB:.1f} ({100 * off_plan(found, mode):+.1f} %)"
        for mode in found["peak_bytes"]
    ]


def _added(ranks: dict[str, dict[str, Any]], mode: str) -> list[tuple[str, int]]:
    """Where a method's steps wait more often than plain ones, over all ranks; the worst places."""
    added: Counter[str] = Counter()
    for found in ranks.values():
        added += Counter(found["waits"][mode]) - Counter(found["waits"]["baseline"])
    return added.most_common(PLACES)


def _whole(whole: dict[str, dict[str, Any]], device: str) -> list[str]:
    lines = []
    for method, found in whole.items():
        batch = f"{found['micro_batches']} x {found['micro_batch_size']} rows"
        lines.append(f"whole 1.4b, {batch}, {method}: {_speed(found, device)}")
        if found["peak_bytes"][method]:
            lines[-1] += f", {_peaks(found)[0]} GiB"
    return lines


def _speed(found: dict[str, Any], device: str) -> str:
    used = mfu(found, device)
    share = f"MFU {used:.1%}" if used else "MFU unknown"
    return f"{tokens_per_second(found):,.0f} tokens/s, {share}"


def verdict(results: Results, missed: list[str]) -> str:
    """The summary line."""
    parts = [f"failed: {', '.join(results.failed)}"] if results.failed else []
    parts += [f"{len(missed)} targets missed"] if missed else []
    return "; ".join(parts) or "all parts ran, no target missed"


# --- the row -----------------------------------------------------------------------------------


def row(results: Results, missed: list[str], here: dict[str, Any], smoke: bool = False) -> str:
    """The line of the table in docs/tested_on.md; a smoke has no figures."""
    said = [results.found["tests"]["summary"]] if "tests" in results.found else []
    if not smoke:
        shares = recipe_overhead(results.ranks(), "let")
        said += [f"LET {share:+.1%} of a {size} step" for size, share in shares.items()]
        said += [f"1.4b {m}: {_speed(f, here['device'])}" for m, f in results.whole().items()]
    said += [verdict(results, missed), *missed]
    today = datetime.date.today().isoformat()
    command = f"`benchmarks/gpu.py{' --cpu-smoke' * smoke}`"
    cells = [today, here["device"], software(here), here["commit"], command]
    return "| " + " | ".join([*cells, "; ".join(said)]) + " |"


def write_row(path: Path, line: str) -> None:
    """Add a row to the page's table, in place of one of the same device and commit."""
    text = path.read_text() if path.exists() else ""
    is_gpu = "CPU" not in line.split("|")[2]
    lines = (text.replace(NO_GPU_YET, "") if is_gpu else text).splitlines()
    same = [cell.strip() for cell in line.split("|")][2:6:2]
    kept = [old for old in lines if [cell.strip() for cell in old.split("|")][2:6:2] != same]
    ends = [number for number, old in enumerate(kept) if old.startswith("|")]
    kept.insert(ends[-1] + 1 if ends else len(kept), line)
    path.write_text("\n".join(kept) + "\n")
