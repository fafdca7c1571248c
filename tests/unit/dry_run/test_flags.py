"""What a dry run reads of a command line, and what it replaces."""

import json

import pytest

from megatron_let.dry_run import flags
from megatron_let.errors import UsageError


def ranks(line):
    options = flags.parse(line.split())
    return flags.ranks(options, flags.world_size(options))


@pytest.mark.parametrize(
    "line, expected",
    [
        ("", [0]),
        ("--pipeline-model-parallel-size 4", [0, 1, 2, 3]),
        ("--pipeline-model-parallel-size=4 --dry-run-world-size 32", [0, 8, 16, 24]),
        ("--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2", [0, 2]),
        (
            "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 "
            "--use-tp-pp-dp-mapping --dry-run-world-size 8",
            [0, 2],
        ),
        ("--dry-run-world-size 8 --dry-run-ranks 7,0,7", [0, 7]),
    ],
)
def test_which_ranks_are_run(line, expected):
    assert ranks(line) == expected


@pytest.mark.parametrize(
    "line, words",
    [
        ("--dry-run-world-size 3 --tensor-model-parallel-size 2", "--dry-run-world-size 3"),
        ("--dry-run-world-size 0", "--dry-run-world-size 0"),
        ("--dry-run-world-size 8 --pipeline-model-parallel-size 0", "the 0 GPUs"),
        ("--tensor-model-parallel-size -1 --pipeline-model-parallel-size -1", "the 1 GPUs"),
        ("--dry-run-ranks 1", "--dry-run-ranks 1: give numbers from 0 to 0"),
        ("--dry-run-ranks first", "--dry-run-ranks first"),
    ],
)
def test_ranks_that_do_not_exist_are_refused(line, words):
    with pytest.raises(UsageError, match=words):
        ranks(line)


@pytest.mark.parametrize(
    "line",
    [
        "--context-parallel-size 2",
        "--num-experts 1",
        "--num-experts 8",
        "--fp8-format hybrid",
        "--multi-latent-attention",
        "--use-megatron-fsdp",
        "--enable-cuda-graph",
        "--cuda-graph-impl local",
        "--skip-train",
    ],
)
def test_what_cannot_be_seen_is_refused_by_name(line):
    with pytest.raises(UsageError, match=f"{line} cannot be run dry: "):
        flags.parse([*line.split(), "--num-layers", "4"])
    flags.parse("--context-parallel-size=1 --num-layers 4 --cuda-graph-impl none".split())


@pytest.mark.parametrize("memory", ["-3", "0", "nan"])
def test_a_gpu_without_memory_is_refused(memory):
    with pytest.raises(UsageError, match="--dry-run-gpu-memory .* must be positive"):
        flags.parse(["--dry-run-gpu-memory", memory])


def replaced(line, folder):
    words = line.split()
    return flags.replaced(words, flags.parse(words), folder)


def test_what_is_not_here_is_replaced_by_its_sizes(tmp_path):
    line = (
        "--num-layers 2 --train-data-path 1 /gone/a 0.5 /gone/b --valid-data-path /gone/c "
        "--data-cache-path /gone --tokenizer-type HuggingFaceTokenizer "
        "--tokenizer-model meta-llama/Llama-3.2-1B --method let "
        "--teacher-model x/llama-3.2-1b --lr 1e-3 "
        "--tensorboard-dir /gone/t --wandb-project p --wandb-exp-name n"
    )
    kept, said = replaced(line, tmp_path)
    assert (
        kept
        == (
            "--num-layers 2 --method let --lr 1e-3 --cpu --fake-process-group "
            "--transformer-impl=transformer_engine --mock-data --tokenizer-type NullTokenizer "
            f"--vocab-size 128256 --teacher-model {tmp_path}/llama-3.2-1b"
        ).split()
    )
    config = json.loads((tmp_path / "llama-3.2-1b" / "config.json").read_text())
    assert config["intermediate_size"] == 8192
    assert [sentence.split()[1] for sentence in said] == ["data", "tokenizer", "config"]


def test_what_is_here_stays(tmp_path):
    (tmp_path / "a.idx").touch()
    (tmp_path / "gpt2").mkdir()
    line = (
        f"--data-path {tmp_path}/a --tokenizer-model {tmp_path}/gpt2 "
        f"--teacher-model {tmp_path}/gpt2 --transformer-impl local"
    )
    kept, said = replaced(line, tmp_path)
    assert kept == [*line.split(), "--cpu", "--fake-process-group"] and said == []


def test_two_tokenizers_that_are_not_here_are_refused(tmp_path):
    with pytest.raises(UsageError, match="--tokenizer-model gpt2 and --teacher-model opt-125m"):
        replaced("--tokenizer-model gpt2 --teacher-model opt-125m", tmp_path)
    (tmp_path / "own").mkdir()
    _, said = replaced(f"--tokenizer-model gpt2 --teacher-model {tmp_path}/own", tmp_path)
    assert said[1].startswith("whatever tokenizer ")
    own = str(tmp_path / "own")  # the other way round, and the same one
    assert replaced(f"--tokenizer-model {own} --teacher-model gpt2", tmp_path)[1][0] == (
        "whatever tokenizer gpt2 has by the student's"
    )
    (tmp_path / "gpt2").rename(tmp_path / "done")
    _, said = replaced("--tokenizer-model gpt2 --teacher-model gpt2", tmp_path)
    assert [sentence.split()[1] for sentence in said] == ["tokenizer", "config"]


def test_a_list_of_data_that_is_here_stays(tmp_path):
    (tmp_path / "blend.txt").write_text("1 a")
    (tmp_path / "a.idx").touch()
    for line in (f"--data-args-path {tmp_path}/blend.txt", f"--data-path 1e-3 {tmp_path}/a"):
        kept, said = replaced(line, tmp_path)
        assert "--mock-data" not in kept and not said
    kept, said = replaced(f"--data-args-path {tmp_path}/gone --kd-selection s.npz", tmp_path)
    assert "--mock-data" in kept and "--kd-selection" not in kept
