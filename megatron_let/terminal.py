"""What others print while they are imported or at work, kept off a log."""

import sys

from transformers.utils import logging as transformers_logging


def bars_on_a_terminal_only() -> None:
    """Have transformers draw its progress bars only where someone sees them move."""
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()
