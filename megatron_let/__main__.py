"""`megatron-let COMMAND ...`, also as `python -m megatron_let COMMAND ...`."""

import sys
from importlib import import_module

COMMANDS = {
    "pretrain": ("pretrain", "train: one process; torchrun -m megatron_let.pretrain"),
    "preprocess": ("commands.preprocess_data", "text to Megatron's .bin and .idx"),
    "inspect": ("commands.inspect_data", "look into such a pair, and check it"),
    "merge": ("commands.merge_datasets", "make one pair of several"),
    "cache": ("commands.prepare_cache", "build a run's index caches ahead"),
    "plan": ("commands.plan", "parameters, memory, days, the fastest layout; on paper"),
    "select": ("commands.select_data", "choose the samples that SALT_DS sees first"),
    "compare": ("commands.compare_runs", "a table and a picture of several runs"),
    "convert": ("commands.convert_checkpoint", "to and from Hugging Face; grow a model"),
    "evaluate": ("commands.evaluate", "exported models on tasks and on text"),
    "quickstart": ("quickstart.run", "a teacher, a plain and a LET student, here"),
}
"""The module in this package of each command, and what it is for."""


def main() -> None:
    """Run the command that the first word names, with the words behind it."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name not in COMMANDS:
        lines = [f"  {name:12}{what}" for name, (_, what) in COMMANDS.items()]
        text = "\n".join(["usage: megatron-let COMMAND ... (each has --help)", "", *lines])
        if name in ("-h", "--help"):
            print(text)
            sys.exit()
        print(f"{text}\n\nmegatron-let: error: there is no command {name}", file=sys.stderr)
        sys.exit(2)
    sys.argv[:2] = [f"megatron-let {name}"]
    module = import_module(f"megatron_let.{COMMANDS[name][0]}")
    (module.run if name == "pretrain" else module.main)()


if __name__ == "__main__":
    main()
