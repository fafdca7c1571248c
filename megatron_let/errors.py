"""The exceptions that a user is meant to read, and what others say."""


class UsageError(ValueError):
    """Something the user can mend: the message names the value and the way out.

    `pretrain_let.py` prints it as one paragraph without a traceback.
    """

    status = 2
    """What a process ends with, as argparse's own errors do: to try again is of no use."""


class MachineError(UsageError):
    """The same, but the fault is this machine's at this time: a scheduler may try again."""

    status = 1


def first_line(error: BaseException) -> str:
    """The first line of what an exception says, or its kind."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
