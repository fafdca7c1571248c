"""No secret of a command line or an environment is printed, logged or saved."""

import re
import sys
from argparse import Namespace
from collections.abc import Callable
from typing import Any

from megatron.training import initialize

from megatron_let.upstream.table import Redirect, around

HIDDEN = "***"
SECRET_NAME = re.compile(
    r"(?i:(?:api|access|private)[-_]?key|secret|passw|passphrase|credential|jwt"
    r"|(?:api|access|auth|bearer|hf|hub)[-_]?token)"
)
_VALUE = r"""(?:"[^"\n]*"|'[^'\n]*'|[^\s"'&,;]+)"""
SECRETS = (
    re.compile(r"(?<=://)()[^/\s@\"']+(?=@)"),  # user and password of an address
    re.compile(rf"((?:{SECRET_NAME.pattern})[\w-]*[\"']? ?[=:] ?){_VALUE}"),
    re.compile(rf"(?i)((?:token|pwd|signature|[?&]key|[?&]sig)=){_VALUE}"),
    re.compile(r"()\bhf_(?=\w*[A-Z0-9])[A-Za-z0-9]{10,}"),
    re.compile(r"()\b(?:gh[opsu]|github_pat|glpat|sk|xox[abp]|nvapi)[-_][\w-]{16,}"),
    re.compile(r"()\b(?:AKIA[A-Z0-9]{16}\b|eyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]+)"),
)
"""Each keeps its first group; what else it finds is hidden."""


def scrubbed(value: Any) -> Any:
    """Return a text, or what is made of texts, with `***` for all that looks like a secret."""
    if isinstance(value, str):
        for pattern in SECRETS:
            value = pattern.sub(rf"\1{HIDDEN}", value)
    elif isinstance(value, dict):
        value = {
            name: HIDDEN if isinstance(v, str) and SECRET_NAME.search(str(name)) else scrubbed(v)
            for name, v in value.items()
        }
    elif isinstance(value, list | tuple):
        before = ["", *value]  # the value of a flag is a word of its own
        value = [
            HIDDEN if str(flag).startswith("--") and SECRET_NAME.search(flag) else scrubbed(word)
            for flag, word in zip(before, value, strict=False)
        ]
    return value


@around
def _without_secrets(function: Callable[..., None], *given: Any) -> None:
    """The function, with a copy of Megatron's arguments, as its last one or as it finds them."""
    argv, get_args = sys.argv, initialize.get_args
    hidden = Namespace(**scrubbed(vars(given[-1] if given else get_args())))
    sys.argv, initialize.get_args = scrubbed(argv), lambda: hidden  # W&B looks at the one
    try:
        function(*given[:-1], *([hidden] if given else []))
    finally:
        sys.argv, initialize.get_args = argv, get_args


_MEGATRON, _SHOWS = "megatron.training", "shows every argument"
REDIRECTS = [
    Redirect(f"{_MEGATRON}.arguments", "_print_args", _without_secrets, _SHOWS),
    Redirect(f"{_MEGATRON}.global_vars", "_set_wandb_writer", _without_secrets, _SHOWS),
    Redirect(f"{_MEGATRON}.training", "write_args_to_tensorboard", _without_secrets, _SHOWS),
]
