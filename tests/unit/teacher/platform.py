"""Run in a worker, where the CPU platform is active."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_let.teacher.load import fingerprint, load_causal_lm, read_teacher_config
from megatron_let.teacher.stage import Teacher


def states_and_fingerprint(folder: Path, tokens: np.ndarray) -> tuple[np.ndarray, str]:
    """The teacher's states of `tokens`, and the fingerprint of its weights."""
    config = read_teacher_config(str(folder))
    model = load_causal_lm(config, torch.float32, torch.device("cpu"))
    states = Teacher(model, config.context).states_BSD({"tokens": torch.from_numpy(tokens)})
    return states.numpy(), fingerprint(model)


def device_of_factories() -> dict[str, Any]:
    """Device types that factories have inside and outside of `with torch.device("meta")`."""
    with torch.device("meta"):
        inside = {torch.empty(2).device.type, torch.zeros(2).device.type, torch.ones(2).device.type}
    return {"inside": inside, "outside": torch.empty(2).device.type}
