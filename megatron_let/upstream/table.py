"""What is replaced in Megatron and PyTorch stands in tables of this one kind, with its reason."""

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator
from pkgutil import resolve_name
from typing import Any, NamedTuple


class Redirect(NamedTuple):
    """One replaced name: `owner.name` becomes `make(upstream's)`, for the stated reason."""

    owner: str
    name: str
    make: Callable[[Any], Any]
    reason: str


def alike(owners: str, names: str, make: Callable[[Any], Any], reason: str) -> Iterator[Redirect]:
    """Yield one redirect for each of some names of each owner, apart by spaces."""
    for owner, name in itertools.product(owners.split(), names.split()):
        yield Redirect(owner, name, make, reason)


_upstream: dict[tuple[str, str], Any] = {}
"""What stood under a name before it was replaced for the first time."""


def apply(redirects: Iterable[Redirect]) -> None:
    """Replace the names. Always made of upstream's own, so a second call replaces the first."""
    for redirect in redirects:
        owner = resolve_name(redirect.owner)
        original = _upstream.setdefault(redirect[:2], getattr(owner, redirect.name))
        setattr(owner, redirect.name, redirect.make(original))


@contextlib.contextmanager
def applied(redirects: Iterable[Redirect]) -> Iterator[None]:
    """Replace the names for a while, by what is made of what stands there now."""
    with contextlib.ExitStack() as stack:
        for redirect in redirects:
            owner = resolve_name(redirect.owner)
            value = getattr(owner, redirect.name)
            stack.callback(setattr, owner, redirect.name, value)
            setattr(owner, redirect.name, redirect.make(value))
        yield


def instead(value: Any) -> Callable[[Any], Any]:
    """A redirect to something that needs nothing of upstream's."""
    return lambda original: value


def by(function: Callable[..., Any]) -> Callable[[Any], Any]:
    """A redirect to a function, as an object of its own.

    torch._dynamo, which every optimizer imports, keeps a table of torch's functions by identity and
    refuses one that has two names.
    """
    return lambda original: lambda *args, **kwargs: function(*args, **kwargs)


def returns(value: Any) -> Callable[[Any], Any]:
    """A redirect to a function that returns this, whatever it is given."""
    return by(lambda *args, **kwargs: value)


def around(function: Callable[..., Any]) -> Callable[[Any], Any]:
    """A redirect to a function that is given upstream's first, then what that one would be given.

    Also a decorator of such functions.
    """

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def called(*args: Any, **kwargs: Any) -> Any:
            return function(original, *args, **kwargs)

        return called

    return make
