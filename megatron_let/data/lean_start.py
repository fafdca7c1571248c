"""Import what a tokenizer needs of transformers, in a third of the time.

Two things take the rest: torch, which transformers imports wherever it is installed, and the
packages `transformers` and `transformers.models`, which read the sources of all 1,700 model files
to learn what names they define.
"""

import importlib.util
import os
import sys
from importlib.metadata import version
from types import ModuleType
from typing import Any

_PACKAGES = ("transformers", "transformers.models")


class _Deferred(ModuleType):
    """A package whose own code runs when somebody asks for a name that is no module of it."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or self.__spec__ is None or self.__spec__.loader is None:
            raise AttributeError(name)
        self.__class__ = ModuleType  # type: ignore[assignment]
        self.__spec__.loader.exec_module(self)
        # transformers puts another object in its place, which must serve who holds this one.
        loaded = sys.modules[self.__name__]
        self.__dict__["__getattr__"] = lambda name: getattr(loaded, name)
        return getattr(loaded, name)


def without_models() -> None:
    """Make the first import of transformers a quick one.

    Only for a process that tokenizes and ends: it can import neither torch nor a model afterwards.
    """
    if "transformers" in sys.modules or "torch" in sys.modules:
        return
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # "PyTorch was not found"
    sys.modules["torch"] = None  # type: ignore[assignment]  # how Python forbids an import
    for name in _PACKAGES:
        spec = importlib.util.find_spec(name)
        assert spec is not None, "transformers is a requirement"
        package = importlib.util.module_from_spec(spec)
        package.__class__ = _Deferred
        sys.modules[name] = package
    transformers, models = (sys.modules[name] for name in _PACKAGES)
    transformers.__dict__.update(__version__=version("transformers"), models=models)
