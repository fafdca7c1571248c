"""What the fork server of `testing.py` imports, once, for all the processes that it forks.

Nothing here may start a thread: a fork has none but its own, and what waits for another hangs.
"""

import functools
import gc
import os
from argparse import ArgumentParser
from types import SimpleNamespace

os.environ["OMP_NUM_THREADS"] = "1"  # read when numpy and torch are imported

import torch  # noqa: E402

from megatron_let.upstream import cpu  # noqa: E402

torch.set_num_threads(1)
cpu.activate()

import megatron.core.models.mimo  # noqa: E402, F401
import transformers.models.auto.modeling_auto  # noqa: E402, F401
import transformers.models.llama.modeling_llama  # noqa: E402, F401
from megatron.training.argument_utils import ArgumentGroupFactory  # noqa: E402
from megatron.training.arguments import add_megatron_arguments  # noqa: E402

import megatron_let.conversion.megatron_logits  # noqa: E402, F401
import megatron_let.training.log  # noqa: E402, F401
import megatron_let.training.resume  # noqa: E402, F401
import megatron_let.training.run  # noqa: E402, F401
from megatron_let.training.arguments import add_arguments  # noqa: E402

_read_docstrings = ArgumentGroupFactory._get_field_docstrings


@functools.cache
def _docstrings(dataclass_: type) -> dict[str, str]:
    """Of a group of flags: Megatron parses its source for each command line, half of a tiny run."""
    return _read_docstrings(SimpleNamespace(_get_field_docstrings=_docstrings), dataclass_)  # type: ignore[arg-type]


ArgumentGroupFactory._get_field_docstrings = lambda _, dataclass_: _docstrings(dataclass_)
add_arguments(add_megatron_arguments(ArgumentParser()))  # reads them, for all forks
gc.freeze()  # what was imported is never garbage, and forks need not look at it
