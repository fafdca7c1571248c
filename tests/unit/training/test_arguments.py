"""Command lines that cannot be right: each is told in one paragraph that names value and way out.

They go through `entry`, in one worker, up to the point where the model would be built.
"""

import re

import numpy as np
import pytest
import sentencepiece
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast, T5Config

from megatron_let.data.indexed import PairWriter, write_index
from tests.support.testing import run_distributed, save_tiny_teacher

STEPS = "--eval-interval 5 --train-iters 10"
LET = f"{STEPS} --mock-data --method let --teacher-model TMP/teacher --let-layer 2"
SALT = f"{STEPS} --mock-data --method salt --teacher-model TMP/teacher"
LONG = "--seq-length 256 --max-position-embeddings 256"
CONSTANT = f"{LET} --let-decay constant"
PLAIN = f"{STEPS} --mock-data"

# name: (flags, patterns that the message must hold)
MISTAKES = {
    "teacher folder missing": (
        f"{CONSTANT} --teacher-model TMP/nowhere",
        "--teacher-model TMP/nowhere: there is no such folder.*hub id",
    ),
    "no tokenizer": (
        f"{PLAIN} --tokenizer-type GPT2BPETokenizer",
        "Add the tokenizer: .*--tokenizer-model with its folder",
    ),
    "a tokenizer's file that is missing": (
        f"{PLAIN} --tokenizer-type GPT2BPETokenizer --vocab-file TMP/none",
        "--vocab-file TMP/none is no file",
    ),
    "no model in the folder": (f"{CONSTANT} --teacher-model TMP/empty", "TMP/empty .*config.json"),
    "not a causal language model": (
        f"{CONSTANT} --teacher-model TMP/t5",
        "TMP/t5 is a T5ForConditionalGeneration, not a causal language model. Choose",
    ),
    "few tokens for a loss of all together": (
        f"{CONSTANT} --let-loss cca",
        "--micro-batch-size 2 x --seq-length 16 are 32 for 48 features, and it takes 2 each. Use",
    ),
    "a map for a loss that asks for none": (
        f"{CONSTANT} --let-loss cca --let-resize linear",
        "--let-resize linear has no effect with --let-loss cca",
    ),
    "a ratio without its rule": (
        f"{CONSTANT} --let-gradient-ratio 2",
        "--let-gradient-ratio 2.0 has no effect without --let-weight-rule ratio",
    ),
    "a ratio that is none": (
        f"{CONSTANT} --let-weight-rule ratio --let-gradient-ratio -1",
        "--let-gradient-ratio -1.0 cannot guide.*positive",
    ),
    "token ids disagree": (
        f"{CONSTANT} --teacher-model TMP/other --tokenizer-type HuggingFaceTokenizer "
        "--tokenizer-model TMP/tokenizer",
        "number tokens differently. --tokenizer-model TMP/tokenizer is neither byte-level nor",
    ),
    "token ids disagree, with distillation": (
        f"{SALT} --teacher-model TMP/other --tokenizer-type HuggingFaceTokenizer "
        "--tokenizer-model TMP/tokenizer",
        "'b' is 1 in the student's.* 2 in .*--tokenizer-model TMP/other. Or --method let",
    ),
    "a longer list of the same tokens": (
        f"{SALT} --teacher-model TMP/longer --tokenizer-type HuggingFaceTokenizer "
        "--tokenizer-model TMP/tokenizer",
        "TMP/longer has learnt tokens that the student's tokenizer lacks, such as 'c'.*Or --method",
    ),
    "length of rows that are the student's": (
        f"{CONSTANT} --teacher-seq-length 64",
        "--teacher-seq-length 64 has no effect: the teacher TMP/teacher reads the student's own",
    ),
    "teacher with a smaller vocabulary": (
        f"{CONSTANT} --teacher-model TMP/small",
        "TMP/small knows 100 token ids, and would be given ids up to 25[45]: choose",
    ),
    "documents kept apart beyond the teacher's context": (
        f"{CONSTANT} {LONG} --reset-position-ids",
        r"--seq-length 256 is longer .*TMP/teacher \(128 tokens\).*windows.*Use shorter sequences",
    ),
    "documents kept apart without a mask": (
        f"{CONSTANT} --reset-attention-mask --no-create-attention-mask-in-dataloader",
        "--reset-attention-mask has no effect with --no-create-attention-mask-in-dataloader",
    ),
    "documents kept apart by a mask that the student ignores": (
        f"{CONSTANT} --reset-attention-mask --transformer-impl transformer_engine",
        "--reset-attention-mask has no effect.*add --transformer-impl local",
    ),
    "positions that the student ignores": (
        f"{CONSTANT} --reset-position-ids --position-embedding-type rope",
        "--reset-position-ids has no effect.*type rope.*Remove it, or add --reset-attention-mask",
    ),
    "keep no checkpoint": (
        f"{PLAIN} --save TMP/save --save-interval 5 --save-keep-last 0",
        "--save-keep-last 0 must be at least 1",
    ),
    "keep what is not saved": (
        f"{PLAIN} --save-keep-last 2",
        "--save-keep-last 2 has no effect without --save",
    ),
    **{
        f"checkpoints by {flag}": (
            f"{PLAIN} --save-interval 5 {flag}",
            f"{words} is refused: .*{end}",
        )
        for flag, words, end in (
            ("--save TMP/save --ckpt-format torch", "--ckpt-format torch", "could never be loaded"),
            ("--load TMP/save --ckpt-format torch_dcp", "--ckpt-format torch_dcp", "Leave it out"),
            (
                "--pretrained-checkpoint x --ckpt-format fsdp_dtensor",
                "--ckpt-format fsdp_dtensor",
                "",
            ),
            (
                "--load x --ckpt-convert-format torch --ckpt-convert-save y",
                "--ckpt-convert-format torch",
                "pretrain_gpt.py converts",
            ),
            (
                "--non-persistent-ckpt-type in_memory",
                "--non-persistent-ckpt-type in_memory",
                "executed",
            ),
        )
    },
    "teacher's layer beyond the teacher": (
        f"{CONSTANT} --let-teacher-layer 3",
        "--let-teacher-layer 3 is outside --teacher-model TMP/teacher, .*1 to 2. Leave it out",
    ),
    "the loss of a teacher without its last layer": (
        f"{CONSTANT} --let-teacher-layer 1 --guidance-stop loss",
        "--guidance-stop loss needs the teacher's last layer, and --let-teacher-layer 1 leaves",
    ),
    "teacher's layer zero": (f"{CONSTANT} --let-teacher-layer 0", "--let-teacher-layer 0 is out"),
    "layer zero": (f"{CONSTANT} --let-layer 0", "--let-layer 0 .*--num-layers 4 allows 1 to 4"),
    "negative layer": (f"{CONSTANT} --let-layer -1", "--let-layer -1 .*allows 1 to 4"),
    "layer beyond the model": (f"{CONSTANT} --let-layer 5", "--let-layer 5 .*allows 1 to 4"),
    "default stop beyond a short run": (
        LET,
        r"--let-stop-step 1500 \(the default\) .*run's 10. .*at most 10, or --let-decay constant",
    ),
    "stop step beyond the run": (f"{LET} --let-stop-step 11", "--let-stop-step 11 is beyond.* 10"),
    "stop step beyond a run given in samples": (
        LET.replace("--train-iters 10", "--train-samples 20") + " --let-stop-step 11",
        "--let-stop-step 11 is beyond the run's 10",
    ),
    "stop at nothing": (f"{LET} --let-stop-step 0", "--let-stop-step 0 must be at least 1"),
    "stop of a constant weight": (
        f"{CONSTANT} --let-stop-step 5",
        "--let-decay constant .*no effect. Remove --let-stop-step, .*--let-decay step",
    ),
    "weight zero": (f"{CONSTANT} --let-weight 0", "--let-weight 0.0 .*0.1.*--method baseline"),
    "negative weight": (f"{CONSTANT} --let-weight -1", "--let-weight -1.0 .*positive"),
    "weight that is no number": (f"{CONSTANT} --let-weight nan", "--let-weight nan .*positive"),
    "LET flag without the method": (
        f"{PLAIN} --let-layer 2",
        "--let-layer has no effect with --method baseline. Remove it, or add --method let",
    ),
    "the same with an equals sign": (f"{PLAIN} --let-layer=2", "^--let-layer has no effect"),
    "teacher without the method": (f"{PLAIN} --teacher-model x", "--teacher-model has no effect"),
    "method without a teacher": (f"{PLAIN} --method let", "needs a teacher. Add --teacher-model"),
    "unknown method": (f"{PLAIN} --method lett", "--method: invalid choice: 'lett' .*baseline"),
    "misspelt flag": (f"{PLAIN} --let-layr 2", "unrecognized arguments: --let-layr 2"),
    "no number of steps": ("--mock-data --eval-interval 5", "Add --train-iters, the number of"),
    "no number of steps to skip": ("--mock-data --skip-train", "Add --train-iters, the number of"),
    "no evaluation interval": ("--mock-data --train-iters 5", "Add --eval-interval, the steps"),
    "save without an interval": (
        f"{PLAIN} --save TMP/run",
        "--save TMP/run needs --save-interval, .*--save-interval 10",
    ),
    "no data at the prefix": (
        f"{STEPS} --data-path TMP/text_document",
        "No data at TMP/text_document: text_document.bin and text_document.idx .*let preprocess",
    ),
    "no data in a blend": (
        f"{STEPS} --train-data-path 0.5 TMP/one 0.5 TMP/absent",
        "No data at TMP/absent: absent.bin",
    ),
    "no data in a list of data": (
        f"{STEPS} --data-args-path TMP/list",
        "No data at TMP/absent: absent.bin",
    ),
    "no such list of data": (
        f"{STEPS} --data-args-path TMP/absent.txt",
        "--data-args-path TMP/absent.txt cannot be read: .*No such file",
    ),
    "weights before some paths": (
        f"{STEPS} --data-path TMP/one TMP/one 0.5 TMP/one",
        "--data-path .*'0.5', .*cannot be read: .*with a weight before each path or before none",
    ),
    "no path": (
        f"{STEPS} --data-path",
        r"--data-path \[\] cannot be read: give one list, with a weight before each path or before",
    ),
    "a set that is switched off": (
        f"{STEPS} --data-path 1 TMP/one 0 TMP/absent",
        "TMP/absent has the weight 0.0: give one above 0, or leave it out",
    ),
    **{
        f"names of validation sets: {flags}": (
            f"{STEPS} --train-data-path TMP/one --valid-data-path TMP/one TMP/one {flags}",
            f"^{flags.split(' --')[0]} must be a name of its own for .*there are 2, with --full",
        )
        for flags in (
            "--validation-set-names a b",
            "--validation-set-names a --full-validation --multiple-validation-sets",
            "--validation-set-names a a --full-validation --multiple-validation-sets",
        )
    },
    "weights of whole sets": (
        f"{STEPS} --train-data-path TMP/one --valid-data-path 1 TMP/one 2 TMP/absent "
        "--full-validation --multiple-validation-sets",
        "--full-validation evaluates each set by itself, without weights",
    ),
    "data of another tokenizer": (
        f"{STEPS} --data-path TMP/one --tokenizer-type HuggingFaceTokenizer "
        "--tokenizer-model TMP/tokenizer",
        r"TMP/one was made with another tokenizer \(fingerprint 0123456789ab\) than .*TMP",
    ),
    "data of another SentencePiece model": (
        f"{STEPS} --data-path TMP/one --tokenizer-type SentencePieceTokenizer "
        "--tokenizer-model TMP/sp.model",
        "TMP/one was made with another tokenizer .*TMP/sp.model",
    ),
    "no tokenizer in the folder": (
        f"{PLAIN} --tokenizer-type HuggingFaceTokenizer --tokenizer-model TMP/empty",
        "Megatron-LM refuses these flags: .*TMP/empty",
    ),
    "an assertion of Megatron's": (
        f"{PLAIN} --global-batch-size 3",
        r"Megatron-LM refuses these flags: .*\(3\) must be divisible by",
    ),
    "an assertion of Megatron's without words": (
        f"{PLAIN} --hidden-size 30",
        "Megatron-LM refuses these flags: assert args.hidden_size % args.num_attention_heads == 0",
    ),
    "an assertion of Megatron's optimizer's": (
        f"{PLAIN} --use-precision-aware-optimizer",
        "Megatron-LM refuses these flags: --use-precision-aware-optimizer only supported with dist",
    ),
    "an MLP that cannot be dealt": (
        f"{PLAIN} --tensor-model-parallel-size 2 --ffn-hidden-size 33",
        "--ffn-hidden-size 33 does not divide over --tensor-model-parallel-size 2",
    ),
    "a sequence that cannot be dealt": (
        f"{PLAIN} --tensor-model-parallel-size 2 --sequence-parallel --seq-length 15",
        "--seq-length 15 does not divide over --tensor-model-parallel-size 2",
    ),
    "batch size that would not grow": (
        f"{PLAIN} --rampup-batch-size 4 2 100",
        "--rampup-batch-size has no effect.*Use --step-batch-size-schedule",
    ),
    "writer that would not be there": (
        f"{PLAIN} --async-save",
        "--async-save has no effect alone.*--use-persistent-ckpt-worker --async-strategy mcore",
    ),
    "distillation flag without the method": (
        f"{PLAIN} --kd-weight 0.5",
        "--kd-weight has no effect with --method baseline. .* salt or reverse-kd or let.salt to",
    ),
    "LET flag with another method": (f"{SALT} --let-layer 2", "--let-layer has no effect.*salt"),
    "salt without a teacher": (f"{PLAIN} --method salt", "--method salt needs a teacher"),
    "part above one": (f"{SALT} --kd-weight 1.5", "--kd-weight 1.5 .*more than 0 and at most 1"),
    "no part": (f"{SALT} --kd-weight 0", "--kd-weight 0.0 .*--method baseline"),
    "a gate at another temperature": (
        f"{SALT} --kd-token-gate --kd-temperature 2",
        "--kd-token-gate compares losses at a temperature of 1",
    ),
    "temperature zero": (f"{SALT} --kd-temperature 0", "--kd-temperature 0.0 must be positive"),
    "distillation beyond the run": (
        f"{SALT} --kd-stop-step 11",
        "--kd-stop-step 11 is outside the run: choose 1 to 10, or --method reverse-kd",
    ),
    "stop of reverse KD": (
        f"{SALT} --method reverse-kd --kd-stop-step 5",
        "--kd-stop-step, --kd-decay and .* have no effect with --method reverse-kd.*--method salt",
    ),
    "distillation and multi-token prediction": (
        f"{SALT} --mtp-num-layers 1 --position-embedding-type rope",
        "--mtp-num-layers 1 is not supported with --method salt: .*--method baseline",
    ),
    "control without a teacher": (
        f"{PLAIN} --teacher-control random",
        "--teacher-control has no effect with --method baseline. .*add --method let or",
    ),
    "two layers of one teacher": (
        f"{CONSTANT} --let-teacher-layer 1 --method let+salt --kd-weight 0.5",
        "Distillation needs the teacher's last layer.*remove --let-teacher-layer",
    ),
    "another kind of batches": (f"{PLAIN} --sft", "--sft is not supported: .*pretrain_gpt.py"),
    "configuration file": (f"{PLAIN} --yaml-cfg TMP/x.yaml", "--yaml-cfg is not supported"),
    "configuration file with equals sign": (f"{PLAIN} --yaml-cfg=x", "--yaml-cfg is not supported"),
    "own layer specification": (f"{CONSTANT} --spec local", "--spec .*--method let: .*Remove it"),
    "multi-token prediction": (
        f"{CONSTANT} --mtp-num-layers 1 --position-embedding-type rope",
        "--mtp-num-layers 1 is not supported with --method let: .*--method baseline",
    ),
    **{
        flags: (f"{PLAIN} {flags}", f"^{flags} {words}")
        for flags, words in (
            ("--seq-length 0", "must be at least 1"),
            ("--seed -1", "must be at least 1"),
            ("--tensor-model-parallel-size 0", "must be at least 1"),
            ("--train-iters -5", "must be 0 or more"),
            ("--num-workers -1", "must be 0 or more"),
            ("--weight-decay nan", "must be 0 or more"),
            ("--lr inf", "must be 0 or more"),
            ("--decoupled-lr nan", "must be 0 or more"),
            ("--rotary-percent 25.0", "must be from 0 to 1"),
            ("--clip-grad nan", "must be 0, which clips nothing, or more"),
            ("--hidden-dropout 2.0", "must be from 0 to 1"),
            ("--split a,b,c", "must be the parts of training, validation and test"),
            ("--split 25,25,25,25", "must be the parts"),
            ("--non-persistent-save-interval 2", "has no effect alone: add --non-persistent-ckpt"),
        )
    },
    "checkpoints without a folder": (
        f"{PLAIN} --non-persistent-save-interval 2 --non-persistent-ckpt-type global",
        "has no effect alone: add --non-persistent-ckpt-type global and --save",
    ),
    "a warm-up beyond the run": (
        f"{PLAIN} --lr-warmup-iters 100",
        "would rise for 200 samples .*after 20 .*warm up for less",
    ),
    "a warm-up from above": (f"{PLAIN} --lr-warmup-init 1", "--lr-warmup-init 1.0 is above --lr 0"),
    "an own rate below its end": (
        f"{PLAIN} --decoupled-lr 1e-4 --decoupled-min-lr 1e-3",
        "--decoupled-lr is 0.0001 and must be at least 0.001, its end",
    ),
    "an own rate below the end of all": (
        f"{PLAIN} --min-lr 1e-4 --decoupled-lr 1e-5",
        "--decoupled-lr is 1e-05 and must be at least 0.0001, its end",
    ),
    "an end of no own rate": (
        f"{PLAIN} --decoupled-min-lr 1e-4",
        "--decoupled-lr is None and must",
    ),
    "a course without its fall": (f"{PLAIN} --lr-decay-style WSD", "and --lr-wsd-decay-iters, its"),
    "a fall in samples of a run in steps": (
        f"{PLAIN} --lr-decay-style WSD --lr-wsd-decay-samples 4",
        "--lr-decay-style WSD and --lr-wsd-decay-iters, .*go together",
    ),
    "a fall without its course": (f"{PLAIN} --lr-wsd-decay-iters 2", "WSD and .*give both, or"),
    "a fall longer than the run": (
        f"{PLAIN} --lr-decay-style WSD --lr-wsd-decay-iters 11",
        "--lr-wsd-decay-iters 11 is longer than the run",
    ),
    "a weight decay that falls": (
        f"{PLAIN} --weight-decay-incr-style linear --start-weight-decay 1 --end-weight-decay 0",
        "weight decay only grows: let --end-weight-decay be",
    ),
    "two schedules": (
        f"{PLAIN} --override-opt-param-scheduler --use-checkpoint-opt-param-scheduler",
        "follows this command's schedule, .*the checkpoint's: give one",
    ),
    "a batch that grows in a run given in steps": (
        f"{PLAIN} --step-batch-size-schedule 0:2,64:4",
        "--step-batch-size-schedule 0:2,64:4 goes with --train-samples",
    ),
    "phases of a run given in steps": (
        f"{PLAIN} --phase-transition-iterations 4",
        "--phase-transition-iterations .* goes with --train-samples",
    ),
    "a signal that is none": (
        f"{PLAIN} --exit-signal-handler --exit-signal SIGFOO",
        "refuses these flags: 'SIGFOO' is unknown",
    ),
    "CUDA graphs": (f"{CONSTANT} --cuda-graph-impl local", "--cuda-graph-impl local is not supp"),
}

FINE = {
    "salt": SALT,
    "let+salt": f"{CONSTANT} --method let+salt --kd-weight 0.5 --teacher-control shuffled",
    "salt with a falling weight": f"{SALT} --kd-decay linear --kd-stop-step 10",
    "reverse KD": f"{SALT} --method reverse-kd --kd-temperature 2",
    "baseline": PLAIN,
    "guided for the whole run": CONSTANT,
    "guided until the last step": f"{LET} --let-stop-step 10",
    "larger vocabulary of the teacher": f"{CONSTANT} --vocab-size 100",
    "tokens that were added to the teacher's": f"{CONSTANT} --teacher-model TMP/superset "
    "--tokenizer-type HuggingFaceTokenizer --tokenizer-model TMP/tokenizer",
    "documents kept apart": f"{CONSTANT} --reset-attention-mask --reset-position-ids",
    "sequences beyond the teacher's context": f"{CONSTANT} {LONG}",
    "another layer of the teacher": f"{CONSTANT} --let-teacher-layer 1",
    "blend with weights": f"{STEPS} --train-data-path 0.5 TMP/one 0.5 TMP/one "
    "--valid-data-path TMP/one",
}


def save_tokenizer(folder, *words, added=()):
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="a"))
    tokenizer.add_tokens(list(added))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="a").save_pretrained(folder)


def save_sentencepiece(folder):
    (folder / "text").write_text("a few words\nand a few more\n" * 20)
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text"), model_prefix=str(folder / "sp"), vocab_size=16, minloglevel=2
    )


@pytest.fixture(scope="module")
def tmp(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    for name in ("teacher", "other", "superset", "longer"):
        save_tiny_teacher(folder / name)
    save_tiny_teacher(folder / "small", vocab_size=100)
    T5Config(architectures=["T5ForConditionalGeneration"]).save_pretrained(folder / "t5")
    save_tokenizer(folder / "tokenizer", "a", "b")
    save_tokenizer(folder / "other", "a", "c", "b")
    save_tokenizer(folder / "superset", "a", "b", added=["c"])
    save_tokenizer(folder / "longer", "a", "b", "c")
    (folder / "empty").mkdir()
    writer = PairWriter(folder / "one")
    writer.add(np.array([1, 2], np.int32), np.array([2], np.int32))
    writer.close()
    write_index(folder / "one", np.int32)
    (folder / "one.json").write_text('{"tokenizer_fingerprint": "0123456789abcdef"}')
    (folder / "list").write_text(f"0.5 {folder}/one 0.5 {folder}/absent")
    save_sentencepiece(folder)
    return str(folder)


@pytest.fixture(scope="module")
def messages(tmp):
    """Message of every command line above, paths of this run written as TMP."""
    flags = {name: flags for name, (flags, _) in MISTAKES.items()} | FINE
    lines = [line.replace("TMP", tmp).split() for line in flags.values()]
    [found] = run_distributed("tests.unit.command_line:usage_errors", 1, lines)
    return {name: text.replace(tmp, "TMP") for name, text in zip(flags, found, strict=True)}


@pytest.fixture(scope="module")
def parser():
    [facts] = run_distributed("tests.unit.command_line:parser_facts", 1)
    return facts


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake_is_told_with_its_value_and_the_way_out(name, messages):
    pattern = MISTAKES[name][1]
    assert re.search(pattern, messages[name], re.DOTALL), messages[name]
    assert "Traceback" not in messages[name]
    assert len(messages[name]) < 500
    assert "\n\n" not in messages[name]


@pytest.mark.parametrize("name", FINE)
def test_what_can_be_right_is_not_refused(name, messages):
    assert messages[name] == ""


def test_layers_that_are_not_named_are_the_third_and_the_teachers_last(tmp):
    line = LET.replace(" --let-layer 2", " --let-decay constant").replace("TMP", tmp).split()
    assert run_distributed("tests.unit.command_line:aligned_layers", 1, line) == [(3, 2)]


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("--save runs/fsdp_study --save-interval 5", "1"),
        ("--megatron-fsdp-main-params-dtype fp32", "1"),
        ("--use-megatron-fsdp --ckpt-format fsdp_dtensor", None),
        ("--use-torch-fsdp2", None),
    ],
)
def test_only_fsdps_own_flags_leave_the_connections_unset(flags, expected):
    """Megatron demands one with tensor parallelism, and more with FSDP."""
    words = [*PLAIN.split(), *flags.split()]
    assert run_distributed("tests.unit.command_line:connections", 1, words) == [expected]


# --- names, and help ----------------------------------------------------------------------------


def test_every_refused_flag_exists_in_megatrons_parser(parser):
    """A misspelt name would refuse nothing."""
    assert parser["flags"].keys() == parser["refused"].keys()
    for name, (options, default) in parser["flags"].items():
        assert f"--{name.replace('_', '-')}" in options
        assert default in parser["refused"][name], "would be refused without being given"


def test_what_a_resume_compares_exists_in_megatrons_parser(parser):
    """A name that no argument has would compare nothing."""
    assert not set(parser["compared"]) - set(parser["known"])


def test_every_unsupported_flag_exists_in_megatrons_parser(parser):
    flags = {f"--{name}" for name in parser["unsupported"]}
    assert flags <= set(parser["options"])


def test_help_shows_our_groups_first_and_then_all_of_megatrons(parser):
    text = parser["help"]
    ours = [
        text.index(f"\nmegatron_let: {name}:\n")
        for name in ("method", "teacher", "LET", "distillation")
    ]
    upstream = [text.index("\noptions:"), text.index("\n  --num-layers ")]
    assert ours == sorted(ours) and max(ours) < min(upstream)
    assert text[: ours[0]].count("\n") < 10, "the synopsis of 900 flags hides the help"


def test_help_explains_each_of_our_flags(parser):
    for flag in (f"--{name.replace('_', '-')}" for name in parser["ours"]):
        entry = re.search(rf"\n  {flag}\b[^\n]*\n?((?:\s{{10,}}[^\n]*\n)+)", parser["help"])
        assert entry and len(entry[0].split()) > 5, flag
