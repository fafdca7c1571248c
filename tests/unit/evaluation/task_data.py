"""Small data sets of random words in the formats of the nine tasks."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

QUESTIONS = 4
SPLITS = ("train", "validation", "test")


def write_task_data(folder: Path) -> Path:
    """Write FOLDER/OWNER/NAME[/SUBSET]/SPLIT.jsonl for every task; returns the folder."""
    rng = random.Random(0)

    def words(count: int) -> str:
        return " ".join(f"w{rng.randrange(2, 300)}" for _ in range(count))

    def choices(i: int) -> dict[str, Any]:
        return {
            "choices": {"text": [words(2) for _ in "ABCD"], "label": list("ABCD")},
            "answerKey": "ABCD"[i % 4],
        }

    formats: dict[str, Callable[[int], dict[str, Any]]] = {
        "Rowan/hellaswag": lambda i: {
            "activity_label": words(2),
            "ctx_a": words(5),
            "ctx_b": words(3),
            "endings": [words(4) for _ in range(4)],
            "label": str(i % 4),
        },
        "allenai/winogrande/winogrande_xl": lambda i: {
            "sentence": f"{words(4)} _ {words(3)}",
            "option1": words(1),
            "option2": words(1),
            "answer": str(1 + i % 2),
        },
        "EleutherAI/lambada_openai/default": lambda i: {"text": words(12)},
        "allenai/openbookqa/main": lambda i: {"question_stem": words(6)} | choices(i),
        "allenai/ai2_arc/ARC-Easy": lambda i: {"question": words(6)} | choices(i),
        "allenai/ai2_arc/ARC-Challenge": lambda i: {"question": words(6)} | choices(i),
        "baber/piqa": lambda i: {
            "goal": words(5),
            "sol1": words(4),
            "sol2": words(4),
            "label": i % 2,
        },
        "allenai/sciq": lambda i: {
            "question": words(5),
            "support": words(10),
            **{name: words(1) for name in ("distractor1", "distractor2", "distractor3")},
            "correct_answer": words(1),
        },
        "aps/super_glue/boolq": lambda i: {
            "question": words(5),
            "passage": words(12),
            "label": i % 2,
        },
    }
    for name, make in formats.items():
        (folder / name).mkdir(parents=True)
        for split in ("test",) if "lambada" in name else SPLITS:
            lines = [json.dumps(make(i)) for i in range(QUESTIONS)]
            (folder / name / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    return folder
