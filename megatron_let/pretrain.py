"""The program: `pretrain_let.py`, `megatron-let pretrain`, `torchrun -m megatron_let.pretrain`."""

import functools
import sys

from megatron_let.dry_run import start
from megatron_let.program import read_command_line
from megatron_let.upstream import cpu

read_command_line()
if "--dry-run" in sys.argv:
    start.begin()
else:
    cpu.activate_if_wanted()  # before Megatron is imported, which reads torch.compile at import

from megatron.core.enums import ModelType
from megatron.training import pretrain

from megatron_let.training import command_line
from megatron_let.upstream.async_saves import prepare_saves
from megatron_let.checkpoint.choice import SAVE_ERRORS, explain_failed_save
from megatron_let.checkpoint.door import Door
from megatron_let.checkpoint.finite import FiniteCheck
from megatron_let.checkpoint.lock import one_run_in, save_folder
from megatron_let.checkpoint.retention import Retention
from megatron_let.checkpoint.sums import Sums
from megatron_let.console import quiet
from megatron_let.errors import UsageError
from megatron_let.methods.table import build_method
from megatron_let.training.log import RunLog
from megatron_let.training.resume import check_resume
from megatron_let.training.run import Run
from megatron_let.upstream.loop_hooks import LISTENERS, LoopHooks
from megatron_let.upstream.mended import mend_megatron
from megatron_let.upstream.secrets import scrubbed


def main() -> None:
    """One run in its `--save`: nothing is written there before."""
    if "--dry-run" in sys.argv:
        from megatron_let.dry_run.rank import DryRank

        DryRank().run(train)
        return
    with one_run_in(save_folder(sys.argv)):
        train()


def train() -> None:
    """Parse the flags, build the configuration, train."""
    mend_megatron()
    door = Door()
    door.install()
    args = command_line.parse_arguments()
    prepare_saves(args)
    method = build_method(args)
    model_config = command_line.model_config(args, method)

    hooks = LoopHooks(args)
    run = Run(args, model_config, method, hooks)
    log = RunLog(args, method, run.bad_losses)
    checks = [] if args.fake_process_group else [FiniteCheck(run.bad_losses)]
    own = [make(args) for make in LISTENERS]
    hooks.listeners = [*method.listeners(), *checks, *own, log, Sums(), Retention(args)]
    door.tell(hooks.on_load)
    check = functools.partial(check_resume, door, args, method)
    model_config.pre_wrap_hooks.insert(0, check)
    if args.init_from is not None:
        from megatron_let.training.init_from import grow

        model_config.pre_wrap_hooks.append(functools.partial(grow, args, door))
    model_config.pre_wrap_hooks.append(log.count_model)

    with hooks.installed():
        pretrain(
            command_line.pretrain_config(args, model_config),
            run.datasets,
            ModelType.encoder_or_decoder,
            run.forward_step,
            get_embedding_ranks=command_line.embedding_ranks(args),
        )


def run() -> None:
    """Run the program; a mistake of the user's ends in one paragraph and exit status 2."""
    try:
        with quiet(sys.argv):
            main()
    except UsageError as error:
        print(f"pretrain_let.py: error: {scrubbed(str(error))}", file=sys.stderr)
        sys.exit(error.status)
    except ImportError as error:
        if (error.name or "").startswith("megatron_let"):
            raise  # a fault of ours
        sys.exit(f"pretrain_let.py: error: a flag needs a package that is not here: {error}")
    except SAVE_ERRORS as error:
        if (reason := explain_failed_save(error)) is None:
            raise
        sys.exit(f"pretrain_let.py: error: {reason}")


if __name__ == "__main__":
    run()
