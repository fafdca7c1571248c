"""Draw where a guided step goes: docs/guided_step.png, from the text below and the real schedule.

.venv/bin/python docs/guided_step.py [PICTURE]
"""

import sys
from pathlib import Path

from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from megatron_let.planning.time import Pass, passes  # noqa: E402

PP, MICRO_BATCHES = 4, 6
TEXT = """
stage 0: layers 1-6, with layer K = 3 and the teacher
stage 1: layers 7-12
stage 2: layers 13-18
stage 3: layers 19-24, output layer, language-model loss
""".strip().splitlines()
KINDS = {
    "teacher": (
        "T",
        0.5,
        "#4c9f70",
        "the teacher reads the micro-batch; its states wait in a queue",
    ),
    "forward": (
        "F",
        1.0,
        "#9db4c0",
        "forward; in layer K the cosine and its gradient are computed",
    ),
    "backward": ("B", 2.0, "#5c6b73", "backward; language-model gradient alone"),
    "aligned": ("B", 2.0, "#d1495b", "backward; in layer K the alignment's gradient is added"),
}
"""Letter, duration, colour, what it is. A teacher's pass is drawn wider than its 3 % of a step."""


def boxes() -> list[tuple[int, str, int, float]]:
    """Stage, kind, micro-batch and start of each pass, played through Megatron's 1F1B."""
    orders = [list(passes(stage, PP, 1, MICRO_BATCHES)) for stage in range(PP)]
    clock, done, found = [0.0] * PP, {}, []
    while any(orders):
        for stage, order in enumerate(orders):
            while order and (before := _ready(stage, order[0], done)) is not None:
                one = order.pop(0)
                start = max(clock[stage], before)
                if stage == 0 and one.is_forward:
                    found.append((stage, "teacher", one.micro_batch, start))
                    start += KINDS["teacher"][1]
                guided = "aligned" if stage == 0 else "backward"
                kind = "forward" if one.is_forward else guided
                found.append((stage, kind, one.micro_batch, start))
                clock[stage] = done[stage, one] = start + KINDS[kind][1]
    return found


def _ready(stage: int, one: Pass, done: dict[tuple[int, Pass], float]) -> float | None:
    """When what a pass needs is there; None if nobody can say yet."""
    neighbour = stage - 1 if one.is_forward else stage + 1
    if neighbour == PP:
        return done.get((stage, one._replace(is_forward=True)))
    return 0.0 if neighbour < 0 else done.get((neighbour, one))


def draw(picture: Path) -> None:
    """Write the picture."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    axes = figure.subplots()
    for stage, kind, micro_batch, start in boxes():
        letter, width, colour, _ = KINDS[kind]
        axes.barh(stage, width, left=start, height=0.72, color=colour, edgecolor="white")
        text = f"{letter}{micro_batch + 1}" if kind != "teacher" else letter
        axes.text(start + width / 2, stage, text, ha="center", va="center", color="white", size=8)
    axes.set_yticks(range(PP), [line.replace(", ", ",\n", 1) for line in TEXT], size=8)
    axes.invert_yaxis()
    axes.set_xlabel("time; nothing of the teacher travels between the stages")
    for letter, _, colour, words in KINDS.values():
        axes.barh(0, 0, color=colour, label=f"{letter}: {words}")
    axes.legend(loc="upper center", bbox_to_anchor=(0.4, 1.32), ncols=2, frameon=False, fontsize=8)
    axes.spines[["top", "right", "left"]].set_visible(False)
    figure.savefig(picture, dpi=130)


if __name__ == "__main__":
    draw(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "docs" / "guided_step.png")
