"""Which settings of a method? Any of its flags, on the comparison's data and teacher.

    .venv/bin/python examples/comparison/sweep.py --regime pass \\
        "salt --kd-weight 1 --kd-stop-step 80" "salt --kd-weight 0.667 --kd-stop-step 80"

The seed (4 unless told) is none of the comparison's, so that no setting is chosen on the batches it
is judged by. Every run is kept; a second call goes on where the first one stopped.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from examples.comparison.run import REGIMES, Comparison, build_parser, open_quickstart  # noqa: E402
from megatron_let.commands.compare_runs import compare_runs  # noqa: E402
from megatron_let.report.targets import compare_all  # noqa: E402


def main() -> None:
    """Train a plain student and one for every setting; print their tables."""
    parser = build_parser(__doc__.splitlines()[0])
    parser.add_argument("settings", nargs="+", metavar='"METHOD FLAGS"')
    parser.add_argument("--regime", choices=REGIMES, default=REGIMES[0])
    parser.add_argument("--seed", type=int, default=4)
    options = parser.parse_args()
    quickstart = open_quickstart(options, options.regime)
    comparison = Comparison(quickstart)
    runs = [quickstart.plain(options.seed)]
    for words in options.settings:
        print(f"{options.regime}: {words}, seed {options.seed}", flush=True)
        # The flags are the name, so that other flags are another run.
        name = "sweep " + words.replace("--", "")
        runs.append(comparison.student(name, f"--method {words}", options.seed))
    print(f"\n{compare_runs(compare_all(runs), comparison.teacher)}")


if __name__ == "__main__":
    main()
