"""Show on a laptop that a small teacher saves a larger student steps: `make quickstart`.

Every stage is kept under runs/quickstart; a second call goes on where the first one stopped. All of
it runs on the CPU, GPUs or not: the models are small, and the processes share one machine.
"""

import argparse
import ctypes
import functools
import importlib.util
import itertools
import os
import re
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from megatron_let.checkpoint.folder import find_checkpoint
from megatron_let.commands import convert_checkpoint, mistakes_told, preprocess_data, tool_parser
from megatron_let.commands.compare_runs import compare_runs
from megatron_let.errors import UsageError
from megatron_let.program import COMMAND, environment
from megatron_let.quickstart.corpus import build_corpus
from megatron_let.quickstart.tokenizer import train_tokenizer
from megatron_let.quickstart.wheels import fetch_wheels
from megatron_let.report.page import write_page
from megatron_let.report.plot import plot_comparison
from megatron_let.report.runs import Run, read_run
from megatron_let.report.targets import compare_all

PROMPT = "import os\n\n\ndef "
PROGRESS = re.compile(r"^> step (\d+)/\d+ \| loss (\S+)")


@dataclass(frozen=True)
class Model:
    """Shape and schedule of one training run."""

    layers: int
    hidden: int
    heads: int
    ffn: int
    steps: int
    lr: float
    """Peak learning rate; the student's is the plain run's best of four (docs/benchmarks.md)."""

    def parameters(self, vocab_size: int) -> int:
        """How many it has with tied embeddings of `vocab_size` rows; 0: without them."""
        layer = 4 * self.hidden**2 + 3 * self.hidden * self.ffn + 2 * self.hidden
        return self.layers * layer + self.hidden + vocab_size * self.hidden


@dataclass(frozen=True)
class Recipe:
    """Everything that a quickstart's size consists of."""

    student: Model
    teachers: dict[str, Model]
    """By regime: `behind` stays ahead of the plain student, `pass` is overtaken by it."""
    let_flags: str = ""
    kd_flags: str = ""
    """Of SALT, for `examples/comparison`."""
    from_wheels: bool = False
    """Text of the pinned wheels, the same on every machine; else of what is installed."""
    train_bytes: int = 24_000_000
    valid_bytes: int = 48_000
    vocab_size: int = 2048
    seq_length: int = 128
    batch: int = 16
    """Sequences a step."""
    evaluations: int = 50
    """Evaluations a student run, each over the whole validation set."""
    saves: int = 2
    warning: str | None = None


FULL = Recipe(
    student=Model(layers=6, hidden=192, heads=6, ffn=512, steps=400, lr=2e-3),
    teachers={
        "behind": Model(layers=2, hidden=128, heads=4, ffn=344, steps=2000, lr=4e-3),
        "pass": Model(layers=2, hidden=128, heads=4, ffn=344, steps=350, lr=4e-3),
    },
    let_flags="--let-layer 2 --let-weight 10 --let-decay linear --let-stop-step 300",
    kd_flags="--kd-weight 1 --kd-stop-step 300",
    from_wheels=True,
)
# A smoke of the same path: too short for a result.
FAST = Recipe(
    student=Model(layers=3, hidden=64, heads=4, ffn=128, steps=40, lr=2e-3),
    teachers={
        "behind": Model(layers=2, hidden=48, heads=3, ffn=96, steps=60, lr=4e-3),
        "pass": Model(layers=2, hidden=48, heads=3, ffn=96, steps=10, lr=4e-3),
    },
    let_flags="--let-layer 2 --let-weight 3 --let-decay linear --let-stop-step 30",
    kd_flags="--kd-weight 0.9 --kd-stop-step 30",
    train_bytes=1_000_000,
    valid_bytes=6_000,
    vocab_size=512,
    seq_length=64,
    batch=8,
    evaluations=5,
    warning="A SMOKE, NO EVIDENCE: so few steps show that everything runs, and nothing about the "
    "methods. Leave out --fast for a comparison.",
)


class Quickstart:
    """The stages over one output folder, behind the teacher of a regime.

    `processes`: the data-parallel ones of a training run; `on_gpu`: they take GPUs, not the CPU.
    """

    def __init__(
        self, recipe: Recipe, folder: Path, regime: str, processes: int, on_gpu: bool = False
    ) -> None:
        self.recipe, self.folder, self.results = recipe, folder, folder / regime
        self.teacher_model = recipe.teachers[regime]
        self.processes, self.on_gpu = processes, on_gpu

    def data(self) -> None:
        """Build corpus, tokenizer and datasets."""
        recipe, corpus, tokenizer = self.recipe, self.folder / "corpus", self.folder / "tokenizer"
        report = build_corpus(
            corpus,
            max_train_bytes=recipe.train_bytes,
            max_valid_bytes=recipe.valid_bytes,
            roots=fetch_wheels() if recipe.from_wheels else (),
        )
        print(
            f"  {report.train.documents} training files of {len(report.train.packages)} packages, "
            f"{report.valid.documents} validation files of others ({report.train.sha256[:12]})"
        )
        train_tokenizer(corpus / "train.jsonl", tokenizer, recipe.vocab_size)
        for split in ("train", "valid"):
            if not (self.folder / f"{split}_text_document.idx").exists():
                preprocess_data.main(
                    f"--input {corpus}/{split}.jsonl --output-prefix {self.folder}/{split} "
                    "--append-eod --workers 2 --tokenizer-type HuggingFaceTokenizer "
                    f"--tokenizer-model {tokenizer}".split()
                )

    def teacher(self) -> tuple[Run, Path]:
        """Train the teacher; return its record and its Hugging Face folder."""
        run = self.train(self.teacher_model, self.results / "teacher", 1, 10)
        return run, self.export(self.results / "teacher", self.results / "teacher-hf")

    def plain(self, seed: int) -> Run:
        """Train a plain student; the regimes share it."""
        recipe, save = self.recipe, self.folder / f"plain-{seed}"
        return self.train(recipe.student, save, seed, recipe.evaluations, "--method baseline")

    def guided(self, name: str, seed: int, flags: str) -> Run:
        """Train a student with a teacher's help, into a folder of that name."""
        recipe, save = self.recipe, self.results / f"{name}-{seed}"
        return self.train(recipe.student, save, seed, recipe.evaluations, flags)

    def train(self, model: Model, save: Path, seed: int, evaluations: int, extra: str = "") -> Run:
        """Train one model, or go on with it; returns its record."""
        if not is_finished(save):
            save.mkdir(parents=True, exist_ok=True)
            python, *program = COMMAND
            launcher = f"-m torch.distributed.run --standalone --nproc_per_node {self.processes}"
            command = [python, *(launcher.split() if self.processes > 1 else []), *program]
            command += [*self.flags(model, save, seed, evaluations), *extra.split()]
            _run_with_progress(command, save, model.steps)
        return read_run(save)

    def flags(self, model: Model, save: Path, seed: int, evaluations: int) -> list[str]:
        """The flags of a training run, but for its method's."""
        recipe, folder = self.recipe, self.folder
        return (
            f"--num-layers {model.layers} --hidden-size {model.hidden} "
            f"--num-attention-heads {model.heads} --ffn-hidden-size {model.ffn} "
            "--swiglu --normalization RMSNorm --disable-bias-linear --position-embedding-type rope "
            f"--seq-length {recipe.seq_length} --max-position-embeddings {recipe.seq_length} "
            "--attention-dropout 0 --hidden-dropout 0 --make-vocab-size-divisible-by 8 "
            f"--micro-batch-size {recipe.batch // self.processes} "
            f"--global-batch-size {recipe.batch} --train-iters {model.steps} --seed {seed} "
            f"--lr {model.lr} --min-lr 0 --lr-decay-style cosine --lr-warmup-fraction 0.05 "
            "--weight-decay 0.1 --adam-beta2 0.95 --clip-grad 1.0 "
            f"--train-data-path {folder}/train_text_document "
            f"--valid-data-path {folder}/valid_text_document "
            "--tokenizer-type HuggingFaceTokenizer "
            f"--tokenizer-model {folder}/tokenizer --data-cache-path {folder}/cache "
            "--num-workers 0 --no-create-attention-mask-in-dataloader "
            f"{'' if self.on_gpu else '--cpu '}"
            "--full-validation --multiple-validation-sets "
            f"--eval-interval {max(1, model.steps // evaluations)} --log-interval 10 "
            f"--save {save} --load {save} --save-interval {max(1, model.steps // recipe.saves)}"
        ).split()

    def export(self, save: Path, folder: Path) -> Path:
        """Write a run's model as a Hugging Face folder."""
        if not (folder / "config.json").exists():
            convert_checkpoint.main(f"to-hf --load {save} --output {folder}".split())
        return folder

    def report(self, runs: list[Run], teacher: Run) -> None:
        """Print and keep the table; draw the picture."""
        warning, loss = self.recipe.warning, teacher.final.loss
        comparisons = compare_all(runs)
        text = f"{warning}\n\n" * bool(warning) + compare_runs(comparisons, teacher)
        (self.results / "report.md").write_text(text + "\n")
        picture = self.results / "report.png"
        title = warning and warning.split(":")[0]
        plot_comparison(comparisons, picture, teacher_loss=loss, title=title)
        page = write_page(comparisons, self.results / "report.html", text, loss)
        print(f"\n{text}\n\nPicture: {picture}\nPage: {page}")


def is_finished(save: Path) -> bool:
    """Whether a run has come to its end; it has not where a kill left no record to be read."""
    try:
        run = read_run(save)
        find_checkpoint(save, run.train_iters)  # a kill may have come between both
    except ValueError:
        return False
    return run.finished


def _run_with_progress(command: list[str], save: Path, steps: int) -> None:
    """Run a training command; a bar on a terminal, else a line every tenth of the run."""
    variables = environment(OMP_NUM_THREADS="1", PYTHONUNBUFFERED="1")
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=variables,
        preexec_fn=functools.partial(_end_with_parent, os.getpid()),
    )
    assert process.stdout is not None
    log = save / "log.txt"
    with log.open("a") as file, tqdm(total=steps, unit="step", disable=None) as bar:
        for line in process.stdout:
            print(line, end="", file=file, flush=True)
            if found := PROGRESS.search(line):
                step, loss = int(found[1]), float(found[2])
                bar.update(step - bar.n)
                bar.set_postfix_str(f"loss {loss:.3f}")
                if bar.disable and step % max(10, steps // 10) == 0:
                    print(f"  {save.name}, step {step:5d} / {steps}: loss {loss:.3f}", flush=True)
    if process.wait():
        tail = "".join(log.read_text().splitlines(keepends=True)[-25:])
        sys.exit(f"{tail}\nThe training run failed; its whole log is {log}")


def _end_with_parent(parent: int) -> None:
    """However that ends: an orphan would go on unseen, and hold its folder against a new start."""
    PR_SET_PDEATHSIG = 1
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # it has ended already
        os._exit(1)


def need(extra: str, *packages: str) -> None:
    """End the process before hours of training if there is no such package, of that extra."""
    for package in packages:
        if importlib.util.find_spec(package) is None:
            sys.exit(f"This needs {package}: pip install 'megatron_let[{extra}]'")


def main() -> None:
    """Run the quickstart; a mistake of the user ends in one paragraph."""
    parser = tool_parser(__doc__, "quickstart")
    parser.add_argument("--fast", action="store_true", help="a short smoke of the same path")
    regimes = "behind: the teacher stays better than the plain student; pass: it is overtaken"
    parser.add_argument("--regime", choices=tuple(FULL.teachers), default="behind", help=regimes)
    seeds, processes = "students of each kind (default 1)", "data-parallel processes (default 2)"
    parser.add_argument("--seeds", type=int, choices=range(1, 10), default=1, help=seeds)
    parser.add_argument("--processes", type=int, choices=(1, 2, 4, 8), default=2, help=processes)
    parser.add_argument("--output", type=Path, default=Path("runs/quickstart"))
    options = parser.parse_args()
    if re.search(r"\s", str(options.output)):
        parser.error(f"--output {options.output}: choose a path without blanks")
    need("plot", "matplotlib", "plotly")
    with mistakes_told(parser, (UsageError, OSError)):
        _run(options)


def _run(options: argparse.Namespace) -> None:
    folder = options.output / ("fast" if options.fast else "full")
    recipe = FAST if options.fast else FULL
    quickstart = Quickstart(recipe, folder, options.regime, options.processes)
    folder.mkdir(parents=True, exist_ok=True)
    number, stages = itertools.count(1), 2 + 3 * options.seeds + 1

    print(f"[{next(number)}/{stages}] data: Python sources", flush=True)
    quickstart.data()
    model = quickstart.teacher_model
    size = f"{model.layers} layers of width {model.hidden}, {model.steps} steps"
    print(f"[{next(number)}/{stages}] teacher: {size}", flush=True)
    teacher, exported = quickstart.teacher()
    let = f"--method let --teacher-model {exported} {recipe.let_flags}"
    runs: list[Run] = []
    for seed in range(1, options.seeds + 1):
        print(f"[{next(number)}/{stages}] plain student, seed {seed}", flush=True)
        runs.append(quickstart.plain(seed))
        print(f"[{next(number)}/{stages}] LET student, seed {seed}", flush=True)
        runs.append(quickstart.guided("let", seed, let))
        print(f"[{next(number)}/{stages}] the teacher grown to a student, seed {seed}", flush=True)
        # RMSNorm averages over the new features too, which are zero.
        epsilon = 1e-5 * model.hidden / recipe.student.hidden
        grown = f"--method baseline --init-from {exported} --norm-epsilon {epsilon:.8g}"
        runs.append(quickstart.guided("growth", seed, grown))
    print(f"[{next(number)}/{stages}] report", flush=True)
    quickstart.report(runs, teacher)
    from megatron_let.conversion.to_hf import sample

    results = quickstart.results
    student = quickstart.export(results / "let-1", results / "let-hf")
    print(f"\nThe LET student, exported to {student}, goes on from {PROMPT!r}:\n")
    print("  " + sample(student, PROMPT).replace("\n", "\n  "))


if __name__ == "__main__":
    main()
