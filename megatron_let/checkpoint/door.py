"""The one way by which a checkpoint comes into a run, in the place of all of Megatron's own."""

import functools
import traceback
import weakref
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from megatron.training import get_args

from megatron_let.checkpoint.choice import choose, mend, refuse_overwriting
from megatron_let.checkpoint.finite import gathered
from megatron_let.checkpoint.folder import SUMS, differing, step_of
from megatron_let.console import say
from megatron_let.errors import MachineError, UsageError
from megatron_let.upstream import safe_loading
from megatron_let.upstream.table import apply


class Door:
    """Chooses a checkpoint, and has Megatron load that one and no other."""

    def __init__(self) -> None:
        self._args: Namespace | None = None
        """Of the run that has chosen; another one in this process chooses for itself."""
        self.chosen: Path | None = None
        """The checkpoint that the run goes on from; None if it starts from scratch."""
        self._from: str | None = None
        """The flag's folder that it was found by; it may lie elsewhere."""
        self._damaged: dict[Path, str] = {}
        self._on_load: Callable[[], Callable[[Namespace], None] | None] = lambda: None

    def install(self) -> None:
        """Replace Megatron's ways; before it parses its command line."""
        safe_loading.install()
        apply(safe_loading.redirects(self._load_base, self._holds, self._load))

    def tell(self, on_load: Callable[[Namespace], None]) -> None:
        """Have a method told the arguments of the checkpoint that was loaded, on every rank."""
        # The door stays in Megatron, and must not keep a run's objects there.
        self._on_load = weakref.WeakMethod(on_load)

    def settle(self, args: Namespace) -> None:
        """Choose a whole checkpoint; called on every rank when the groups are there."""
        alone = args.fake_process_group
        rank = 0 if alone else torch.distributed.get_rank()
        ranks = 1 if alone else torch.distributed.get_world_size()
        while True:
            decided = agreed(lambda: self._decide(args) if rank == 0 else None, ranks)
            self.chosen, args.finetune, self._from = decided[0]
            if self.chosen is None:
                break
            found = agreed(functools.partial(differing, self.chosen, rank, ranks), ranks)
            if not any(found):
                break
            self._damaged[self.chosen] = next(filter(None, found))
        self._args = args

    def _decide(self, args: Namespace) -> tuple[Path | None, bool, str | None]:
        """What is chosen, whether its weights alone are taken, and which folder gave it."""
        chosen, finetune, origin = None, args.finetune, args.load
        if args.load is not None:
            chosen = choose(args, args.load, self._damaged)
        if chosen is None and args.pretrained_checkpoint is not None:
            origin, finetune = args.pretrained_checkpoint, True
            chosen = choose(args, origin, self._damaged)
        start = 0 if chosen is None or finetune else step_of(chosen)
        if start and args.override_ckpt_iteration is not None:
            start = args.override_ckpt_iteration
        refuse_overwriting(args, start, self._damaged)
        if chosen is None and args.load is not None:
            say(f"> {args.load} holds no checkpoint yet: starting from scratch")
        if args.verify_integrity and chosen is not None and not (chosen / SUMS).is_file():
            say(f"> {chosen} has no sums: nobody can vouch for what is in its files")
        return chosen, finetune, origin

    def _folder(self, args: Namespace, load: str) -> Path | None:
        # --use-checkpoint-args comes before there is a process group to agree in.
        return self.chosen if self._args is args else choose(args, load, {})

    def _holds(self, load: str | None) -> bool:
        """`checkpoint_exists`."""
        args = get_args()
        if load is None or (self._args is args and load != self._from):
            return False
        return self._folder(args, load) is not None

    def _load_base(
        self, load: str, args: Namespace, rank0: bool = False, **states: Any
    ) -> safe_loading.Loaded:
        """`_load_base_checkpoint`, of the chosen one; `rank0` asks for no tensors."""
        folder = self._folder(args, load)
        if folder is None:
            return safe_loading.NOTHING
        if not rank0:
            return safe_loading.whole_state(folder, step_of(folder), args, states)
        found = safe_loading.common_state(folder, step_of(folder))
        saved = getattr(found[0].get("args"), "spec", None)
        if args.use_checkpoint_args and saved not in (None, args.spec):
            raise UsageError(
                f"The checkpoint's --spec {saved} names code, which --use-checkpoint-args would "
                "import and call. If you trust it, give the same --spec on the command line."
            )
        return found

    def saved_args(self, args: Namespace) -> Namespace | None:
        """Return the arguments in the checkpoint that a run goes on from, None without one."""
        state, _, is_release, _ = self._load_base(args.load, args, rank0=True)
        return None if is_release or not state else state.get("args")

    def _load(self, load: Callable[..., Any], *model: Any, **kwargs: Any) -> tuple[int, int]:
        """`load_checkpoint`, again from an older one where the load itself finds damage."""
        args: Namespace = get_args()
        try:
            loaded = load(*model, **kwargs)
        except safe_loading.DamagedCheckpoint as error:
            if self._args is not args or self.chosen is None:
                raise
            self._damaged[self.chosen] = str(error)
            self.settle(args)
            return self._load(load, *model, **kwargs)
        if self._args is args and self.chosen:
            if torch.distributed.get_rank() == 0:
                mend(args, self.chosen, self._damaged)
            tell = None if args.finetune else self._on_load()
            if tell and (saved := self.saved_args(args)) is not None:
                tell(saved)
        return loaded


def agreed(find: Callable[[], Any], ranks: int | None = None) -> list[Any]:
    """What each rank finds; the error of one is raised on all, or they would wait for ever."""
    try:
        found = find()
    except UsageError as error:
        found = error
    except OSError as error:
        found = MachineError(str(error))
    except Exception as error:  # the others would wait for this rank
        traceback.print_exc()
        found = MachineError(f"{type(error).__name__}: {error}")
    every = [found] if ranks == 1 else gathered(found)
    for found in every:
        if isinstance(found, UsageError):
            raise found
    return every
