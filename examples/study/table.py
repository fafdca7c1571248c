"""The declared runs of the study, in the order in which they are made. Written before the first.

Parameters are counted as Chinchilla counts them, with the embeddings, which are tied: the student
has 0.39 M (0.31 M without them) and reads 8.2 M tokens, 21 a parameter. Three teachers are trained:
the small one has 0.10 M (ratio 3.7; 5.6 without embeddings) and reads 66 M tokens, 626 a parameter;
the large one has 0.16 M (2.4; 3.1) and reads 41 M, 249 a parameter. A regime takes the checkpoint
whose validation loss fits (`REGIMES`), of the first teacher that has one. Plain training passed
both in the end, so that `ahead` has a third one, declared before any run behind it: 0.26 M (1.5;
1.6), 66 M tokens, 248 a parameter.

Tuning: each arm gets five runs with seed 1 behind the teacher of `meet`: three peak learning rates
with its first setting, then its two other settings at the best of these rates (plain training,
which has no setting, takes two rates beside the best). The lowest last validation loss in domain
decides: that run is the arm's row for seed 1; seeds 2 and 3 repeat it. LET at the paper's weight is
not tuned: it runs at plain training's best rate. So do the other regimes and the controls, with
their arm's setting of `meet`.

Declared when these had run: `--guidance auto`, whose constants rest on them. What judges it is
another size, regime and text. Then, with it, ways to meet the teacher's width.
"""

import math
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_let.quickstart.run import Model, Recipe

MEET = "meet"


@dataclass(frozen=True)
class Regime:
    """How good the teacher is, by the plain run of seed 1 at its best rate."""

    share: float | None
    """Of a teacher's checkpoints the one whose loss is nearest to the plain run's after this part
    of its steps; None: the last one."""
    window: tuple[float, float] = (0.0, math.inf)
    """Where in its run the plain run must pass the teacher (infinity: never), or the next teacher
    is looked at."""


REGIMES = {
    MEET: Regime(0.8, (0.67, 0.9)),
    "overtaken": Regime(0.3, (0.1, 0.5)),
    "ahead": Regime(None, (1.0, math.inf)),
}


@dataclass(frozen=True)
class Setting:
    """What an arm may tune besides the rate."""

    name: str
    flags: str = "--method baseline"
    """Of pretrain_let.py; `{0.5}` stands for the step after half of the run."""
    depth: str | None = None
    """How a teacher's layers become the student's (grow.py); None: not grown."""
    rate_factor: float = 1.0


@dataclass(frozen=True)
class Arm:
    """A way to train the student: the first setting is tried with all rates."""

    name: str
    label: str
    """In tables and pictures."""
    settings: tuple[Setting, ...]
    rates: tuple[float, ...] = (2e-3, 4e-3, 8e-3)
    depth_like: "Arm | None" = None
    """The arm whose tuning says how the teacher's layers are laid out."""

    @property
    def first_runs(self) -> tuple[str, ...]:
        """The tuning runs that differ in the rate alone."""
        return tuple(f"{self.name}-rate-{rate:g}" for rate in self.rates)

    @property
    def tuning_runs(self) -> tuple[str, ...]:
        """All of them; the best is the arm's row for seed 1."""
        later = (f"{self.name}-{s.name.replace(' ', '-')}" for s in self.settings[1:])
        return (*self.first_runs, *later)


@dataclass(frozen=True)
class Planned:
    """A declared run. What depends on earlier runs names them: the best of them decides."""

    name: str
    group: str
    """`tuning`, `seeds`, `regimes`, `controls`, `auto` or `widths`."""
    arm: Arm
    seed: int = 1
    rate: float | tuple[str, ...] = ()
    """A peak learning rate, or the runs whose best gives it."""
    setting: Setting | tuple[str, ...] = ()
    """A setting, or the runs whose best gives it."""
    regime: str = MEET
    control: str | None = None
    """`--teacher-control`; a grown one starts from an untrained teacher."""

    @property
    def needs(self) -> tuple[str, ...]:
        """The runs that must be done before this one is known."""
        found = self.depth_from
        for value in (self.rate, self.setting):
            found += value if isinstance(value, tuple) else ()
        return found

    @property
    def depth_from(self) -> tuple[str, ...]:
        """The runs whose best says how the teacher's layers are laid out."""
        return self.arm.depth_like.tuning_runs if self.arm.depth_like else ()


@dataclass(frozen=True)
class Table:
    """All that a study consists of."""

    recipe: Recipe
    runs: tuple[Planned, ...]
    hashes: dict[str, str]
    """SHA-256 of the text's files, by name; empty where it differs between machines."""
    regimes: dict[str, Regime]
    documentation_bytes: int = 120_000
    teacher_checkpoints: int = 100


# --- arms ---------------------------------------------------------------------------------------

LET = "--method let --let-layer 1 --let-stop-step {0.5} --let-weight"
GROWN_RATES = (1e-3, 2e-3, 4e-3)
"""A grown student does not start from nothing and wants less."""

PLAIN = Arm(
    "plain",
    "plain",
    (
        Setting("plain"),
        Setting("rate x 0.7", rate_factor=0.7),
        Setting("rate x 1.4", rate_factor=1.4),
    ),
)
PAPER = Arm("paper", "LET, the paper's weight", (Setting("weight 0.1", f"{LET} 0.1"),), rates=())
GUIDED = Arm("let", "LET", tuple(Setting(f"weight {w}", f"{LET} {w}") for w in (10, 3, 30)))
SALT = Arm(
    "salt",
    "SALT",
    (
        Setting("stop 0.173", "--method salt"),
        Setting("stop 0.35", "--method salt --kd-stop-step {0.35}"),
        Setting("stop 0.6", "--method salt --kd-stop-step {0.6}"),
    ),
)
GROWTH = Arm(
    "growth",
    "growth",
    tuple(Setting(depth, depth=depth) for depth in ("stack", "identity", "interleave")),
    GROWN_RATES,
)
GROWTH_LET = Arm(
    "growth-let",
    "growth + LET",
    tuple(Setting(f"weight {w}", f"{LET} {w}") for w in (1, 10, 0.1)),
    GROWN_RATES,
    depth_like=GROWTH,
)
TUNED = (PLAIN, GUIDED, SALT, GROWTH, GROWTH_LET)
AUTO = tuple(
    (held, Arm(f"auto-{name}", f"{label}, auto", (Setting("auto", f"{flags} --guidance auto"),)))
    for held, name, label, flags in (
        (GUIDED, "let", "LET", "--method let --let-layer 1"),
        (SALT, "salt", "SALT", "--method salt"),
        (GUIDED, "both", "LET + SALT", "--method let+salt --let-layer 1"),
        (GUIDED, "loss", "LET by the loss", "--method let --let-layer 1 --guidance-stop loss"),
    )
)
"""What an arm that sets itself is held against, and takes the rate of: nothing else is tuned."""
WIDTHLESS = Path(__file__).with_name("widthless.py")
AS_AUTO = "--let-weight-rule ratio --let-gradient-ratio 0.5 --let-stop-step {0.5}"
"""What it chooses, for what it refuses."""
WIDTHS = tuple(
    Arm(f"{name}-let", label, (Setting("auto", f"--method let --let-layer 1 {flags}"),))
    for name, label, flags in (
        ("linear", "LET, a learned map", f"{AS_AUTO} --let-resize linear"),
        ("cka", "LET, CKA", f"--guidance auto --method-module {WIDTHLESS} --let-loss cka"),
        ("cca", "LET, CCA", "--guidance auto --let-loss cca"),
    )
)
"""Instead of interpolating the teacher's features, likewise with nothing tuned."""
CCA = WIDTHS[-1]


# --- runs ---------------------------------------------------------------------------------------


def tuning(arm: Arm) -> list[Planned]:
    """The runs that choose an arm's rate and setting."""
    first = [
        Planned(name, "tuning", arm, rate=rate, setting=arm.settings[0])
        for name, rate in zip(arm.first_runs, arm.rates, strict=True)
    ]
    later = [
        Planned(name, "tuning", arm, rate=arm.first_runs, setting=setting)
        for name, setting in zip(arm.tuning_runs[len(first) :], arm.settings[1:], strict=True)
    ]
    return first + later


def repeated(arm: Arm, seed: int) -> Planned:
    """An arm as it was tuned, with another seed."""
    best = arm.tuning_runs
    return Planned(f"{arm.name}-seed-{seed}", "seeds", arm, seed, best, best)


def paper(plain: Arm, seed: int) -> Planned:
    """LET at the paper's weight, which nothing was tuned for."""
    name = f"{PAPER.name}-seed-{seed}"
    return Planned(name, "seeds", PAPER, seed, plain.tuning_runs, PAPER.settings[0])


def automatic(tuned: Arm, auto: Arm, seed: int, regime: str, plain: Arm) -> Planned:
    """Guidance that sets itself, with the rate of what it is held against."""
    name = f"{auto.name}-seed-{seed}" if regime == MEET else f"{regime}-{auto.name}"
    rate = tuned.tuning_runs if regime == MEET else plain.tuning_runs
    return Planned(name, "auto", auto, seed, rate, auto.settings[0], regime)


def elsewhere(plain: Arm, arm: Arm, regime: str, control: str | None = None) -> Planned:
    """An arm's setting of `meet` at plain training's rate: in another regime, or as a control."""
    group, before = ("controls", control) if control else ("regimes", regime)
    rate, setting = plain.tuning_runs, arm.tuning_runs
    return Planned(f"{before}-{arm.name}", group, arm, 1, rate, setting, regime, control)


def declare(
    tuned: tuple[Arm, ...], seeds: tuple[int, ...], regimes: Collection[str] = REGIMES
) -> tuple[Planned, ...]:
    """All runs: tuning, further seeds, the other regimes, controls. The first arm is plain."""
    plain, *guides = tuned
    known = {arm.name: arm for arm in tuned}
    others = [regime for regime in regimes if regime != MEET]
    controls = ("shuffled", GUIDED), ("random", GUIDED), ("random", SALT), ("random", GROWTH)
    runs = [*tuning(plain), paper(plain, 1)]
    runs += [run for arm in guides for run in tuning(arm)]
    for seed in seeds:
        first, *others_of_seed = (repeated(arm, seed) for arm in tuned)
        runs += [first, paper(plain, seed), *others_of_seed]
    runs += [elsewhere(plain, arm, regime) for regime in others for arm in guides]
    runs += [elsewhere(plain, known[a.name], MEET, c) for c, a in controls if a.name in known]
    cells = [(seed, MEET) for seed in (1, *seeds)] + [(1, name) for name in others]
    for held, auto in AUTO:
        if (arm := known.get(held.name)) is not None:
            runs += [automatic(arm, auto, *cell, plain) for cell in cells]
    return tuple(runs)


STUDY = Table(
    recipe=Recipe(
        student=Model(layers=4, hidden=80, heads=5, ffn=216, steps=1000, lr=4e-3),
        teachers={
            "small": Model(layers=2, hidden=48, heads=3, ffn=128, steps=8_000, lr=5e-3),
            "large": Model(layers=2, hidden=64, heads=4, ffn=172, steps=5_000, lr=5e-3),
            "deep": Model(layers=4, hidden=64, heads=4, ffn=172, steps=8_000, lr=5e-3),
        },
        train_bytes=120_000_000,
        valid_bytes=120_000,
        vocab_size=1024,
        batch=64,
        evaluations=50,
        saves=10,
        from_wheels=True,
    ),
    runs=(
        *declare(TUNED, seeds=(2, 3)),
        *(
            Planned(arm.name, "widths", arm, 1, GUIDED.tuning_runs, arm.settings[0])
            for arm in WIDTHS
        ),
        *(
            Planned(f"{CCA.name}-seed-{n}", "widths", CCA, n, GUIDED.tuning_runs, CCA.settings[0])
            for n in (2, 3)
        ),
        Planned("ahead-cca-let", "widths", CCA, 1, PLAIN.tuning_runs, CCA.settings[0], "ahead"),
    ),
    hashes={
        "corpus/train.jsonl": "06bdd03793ffea91b7cecbbd823796926b2849eb9e72e37941712476af9a1bb1",
        "corpus/valid.jsonl": "a4059448db80bffced9fdcf7621adb9e83cc03bb49500f340a5fdea64831442d",
        "corpus/documentation.jsonl": (
            "52d28ae8a80987dffd4a51c1ebf2e206c6c212a4a5e84f5188af00f1ff2e1450"
        ),
        "tokenizer/tokenizer.json": (
            "87ba485cee2e005bf02f8aa273baa9deb416d9bbb6fe6e61593299de542b0d0b"
        ),
    },
    regimes=REGIMES,
)


def _with(arm: Arm, setting: str) -> Arm:
    """An arm that tunes its rate alone."""
    return replace(arm, settings=tuple(s for s in arm.settings if s.name == setting))


# What judges the constants of --guidance auto: 3.4 times as large, 21 tokens a parameter, teachers
# of a ratio of 2.4 and 1.8; the settings are what the smaller size chose, the rates are tuned anew.
LARGER = Table(
    recipe=replace(
        STUDY.recipe,
        student=Model(layers=6, hidden=128, heads=8, ffn=344, steps=3_400, lr=4e-3),
        teachers={
            "small": Model(layers=4, hidden=96, heads=6, ffn=256, steps=16_500, lr=4e-3),
            "large": Model(layers=4, hidden=112, heads=7, ffn=304, steps=16_500, lr=4e-3),
        },
    ),
    runs=declare(
        (_with(PLAIN, "plain"), _with(GUIDED, "weight 3"), _with(SALT, "stop 0.35")),
        seeds=(2, 3),
        regimes=(MEET,),
    ),
    hashes=STUDY.hashes,
    regimes={MEET: REGIMES[MEET]},
)


def _one_run(arm: Arm) -> Arm:
    return replace(arm, rates=arm.rates[1:2], settings=arm.settings[:1])


# A smoke of the same path: too short for a result, on what is installed.
FAST = Table(
    recipe=replace(
        STUDY.recipe,
        student=Model(layers=4, hidden=48, heads=3, ffn=96, steps=20, lr=4e-3),
        teachers={"small": Model(layers=2, hidden=32, heads=2, ffn=64, steps=20, lr=4e-3)},
        train_bytes=1_000_000,
        valid_bytes=6_000,
        vocab_size=512,
        seq_length=64,
        batch=8,
        evaluations=5,
        saves=2,
        from_wheels=False,
    ),
    runs=declare(tuple(_one_run(arm) for arm in (PLAIN, GUIDED, GROWTH)), seeds=(2,)),
    hashes={},
    regimes={name: Regime(regime.share) for name, regime in REGIMES.items()},
    documentation_bytes=6_000,
    teacher_checkpoints=5,
)
