"""The one exception a user is meant to read."""


class UsageError(ValueError):
    """Something the user can mend: the message names the value and the way out.

    `pretrain_let.py` prints it as one paragraph without a traceback; library callers can catch it
    as the `ValueError` it is.
    """
