"""Run in a worker: a run whose output is kept."""

import contextlib
import io

from tests.distributed.training import train_tracked


def printed(argv: list[str]) -> str:
    """Train with W&B offline; return what was printed."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        train_tracked(argv)
    return output.getvalue()
