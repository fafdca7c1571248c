"""A trained checkpoint, exported: Hugging Face computes the loss that Megatron logged.

The validation set is one document of 8 * 64 + 1 tokens, which Megatron cuts into exactly the 8
sequences of one validation batch: their mean loss does not depend on the order they are drawn in.
Megatron's softmax counts the rows that only pad the vocabulary, so one layout has such rows and the
test puts them back, and the other has none.
"""

import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from megatron_let.checkpoint.folder import find_checkpoint
from megatron_let.checkpoint.reader import Checkpoint
from megatron_let.conversion.to_hf import export, sample
from megatron_let.data.preprocess import PreprocessConfig, preprocess
from tests.support.testing import run_distributed

VOCAB_SIZE, SEQ_LENGTH, BATCH, ITERATIONS = 300, 64, 8, 3
TOLERANCE = 1e-4  # relative; fp32 on both sides, in another order
MODEL = (
    "--num-layers 4 --hidden-size 64 --num-attention-heads 4 --ffn-hidden-size 128 --swiglu "
    "--normalization RMSNorm --disable-bias-linear --position-embedding-type rope "
    "--rotary-base 5000 --norm-epsilon 1e-6 --attention-dropout 0 --hidden-dropout 0 "
    # Large weights, so that attention and MLP matter for the loss of a barely trained model.
    "--init-method-std 0.2 --max-position-embeddings 128"
).split()
TRAINING = (
    f"--seq-length {SEQ_LENGTH} --micro-batch-size 2 --global-batch-size {BATCH} --lr 1e-2 "
    f"--train-iters {ITERATIONS} --eval-iters 1 --eval-interval {10 * ITERATIONS} "
    f"--save-interval {10 * ITERATIONS} --log-interval 1 --num-workers 0"
).split()
LAYOUTS = {
    "tp1": "--group-query-attention --num-query-groups 2 --kv-channels 32 "
    "--untie-embeddings-and-output-weights --make-vocab-size-divisible-by 100",
    # Another make of model, too: tied embeddings and a key head for each query head.
    "tp2-pp2": "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 "
    "--make-vocab-size-divisible-by 128",
}
WORLD_SIZE = {"tp1": 1, "tp2-pp2": 4}
NUM_ROWS = {"tp1": 300, "tp2-pp2": 512}


def words(count: int, seed: int) -> str:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(VOCAB_SIZE - 1, (count,), generator=generator)
    return " ".join(f"w{i}" for i in ids.tolist())


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    vocabulary = {f"w{i}": i for i in range(VOCAB_SIZE - 1)} | {"<end>": VOCAB_SIZE - 1}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<end>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(
        folder / "tokenizer"
    )
    for name, count in (("train", 4000), ("valid", BATCH * SEQ_LENGTH + 1)):
        (folder / f"{name}.jsonl").write_text(json.dumps({"text": words(count, seed=count)}) + "\n")
        preprocess(
            PreprocessConfig(
                input=(str(folder / f"{name}.jsonl"),),
                output_prefix=str(folder / name),
                tokenizer_model=str(folder / "tokenizer"),
            )
        )
    return folder


@pytest.fixture(scope="module")
def runs(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Train each layout for three steps; returns the runs' folders."""
    folders = {layout: tmp_path_factory.mktemp(layout) for layout in LAYOUTS}
    for layout, save in folders.items():
        argv = [*MODEL, *TRAINING, *LAYOUTS[layout].split(), "--save", str(save)]
        for split in ("train", "valid"):
            argv += [f"--{split}-data-path", str(data / f"{split}_text_document")]
        argv += ["--data-cache-path", str(save / "cache"), "--cpu"]
        argv += "--tokenizer-type HuggingFaceTokenizer --tokenizer-model".split()
        argv += [str(data / "tokenizer")]
        errors = run_distributed("tests.distributed.training:train", WORLD_SIZE[layout], argv)
        assert set(errors) == {None}
    return folders


def restore_padding(model: torch.nn.Module, save: Path) -> int:
    """Put back the output rows without a token, which Megatron's loss counts; returns all rows."""
    checkpoint = Checkpoint(find_checkpoint(save))
    tied = model.config.tie_word_embeddings
    table = checkpoint.read(f"{'embedding.word_embeddings' if tied else 'output_layer'}.weight")
    assert torch.equal(table[:VOCAB_SIZE], model.lm_head.weight)
    model.lm_head.weight = torch.nn.Parameter(table)
    return len(table)


def logged_validation_loss(save: Path) -> float:
    records = [json.loads(line) for line in (save / "metrics.jsonl").read_text().splitlines()]
    (loss,) = [record["lm loss"] for record in records if record["kind"] == "valid"]
    return loss


def hugging_face_loss(model: torch.nn.Module, folder: Path, data: Path) -> float:
    text = json.loads((data / "valid.jsonl").read_text())["text"]
    ids = torch.tensor(AutoTokenizer.from_pretrained(folder)(text)["input_ids"])
    assert len(ids) == BATCH * SEQ_LENGTH + 1
    with torch.no_grad():
        logits = model(input_ids=ids[:-1].view(BATCH, SEQ_LENGTH)).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[1:]).item()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_hugging_face_computes_the_logged_loss(
    runs: dict[str, Path], layout: str, data: Path, tmp_path: Path
) -> None:
    run = runs[layout]
    folder = export(run, tmp_path / "hf", max_shard_size="200KB")
    assert sample(folder, "w1 w2").startswith("w1 w2 ")
    assert len(list(folder.glob("model-*.safetensors"))) > 1

    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.config.vocab_size == VOCAB_SIZE == model.lm_head.weight.shape[0]
    assert restore_padding(model, run) == NUM_ROWS[layout]
    expected = logged_validation_loss(run)
    loss = hugging_face_loss(model, folder, data)
    assert loss == pytest.approx(expected, rel=TOLERANCE)

    # Twin: with key and value heads of two groups exchanged, the loss must differ.
    mix_up_heads(model)
    wrong = hugging_face_loss(model, folder, data)
    assert wrong != pytest.approx(expected, rel=10 * TOLERANCE)
    print(f"Megatron {expected:.6f}, Hugging Face {loss:.6f}, heads mixed up {wrong:.6f}")


def mix_up_heads(model: torch.nn.Module) -> None:
    for layer in model.model.layers:
        for projection in (layer.self_attn.k_proj, layer.self_attn.v_proj):
            heads = projection.weight.data.view(model.config.num_key_value_heads, -1)
            heads.copy_(heads.roll(1, dims=0))
