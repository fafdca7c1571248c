"""`--init-from` fills every layout with what `grow` and `from-hf` write, bit for bit."""

import json
import math
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from sentencepiece import SentencePieceTrainer

from megatron_let.conversion.from_hf import import_model
from megatron_let.conversion.grow import grow_model
from megatron_let.conversion.growth import Growth
from tests.distributed.training import TP2_PP2, run, series
from tests.support.testing import run_distributed, save_tiny_teacher
from tests.support.tiny_run import FLAGS, VOCAB, hashes

STUDENT = "--norm-epsilon 5e-7".split()
"""Half of the small model's, at twice its width; a repeated one keeps it."""
PADDED = "--make-vocab-size-divisible-by 144".split()  # 32 rows more than tokens, with TP 2 too
STILL = [*"--lr 0 --min-lr 0 --weight-decay 0 --exit-interval 1".split(), *PADDED]
LAYOUTS = {
    "single": (1, []),
    "tp2_pp2_sp": (4, [*TP2_PP2, "--sequence-parallel"]),
    "vpp": (2, "--pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 2".split()),
    "zero1": (2, ["--use-distributed-optimizer"]),
}
SIZES = {"hidden_size": 32, "num_layers": 4, "ffn_hidden_size": 64, "kv_channels": 8}
GROWTHS = {
    "pad": (Growth(), []),
    "clone": (
        Growth(width="clone", depth="stack", symmetry="noise"),
        "--init-width clone --init-depth stack --init-symmetry noise --norm-epsilon 1e-6".split(),
    ),
}


@pytest.fixture(scope="module")
def small(corpus, tmp_path_factory):
    """Half as wide and deep as the student, heads of half the size."""
    folder = tmp_path_factory.mktemp("small") / "model"
    return save_tiny_teacher(folder, vocab_size=VOCAB, width=16, seed=3)


def weights(save):
    return {n: sha for n, sha in hashes(save).items() if not n.startswith("optimizer.")}


@pytest.fixture(scope="module")
def expected(corpus, small, tmp_path_factory):
    """The weights of runs that load what the tools wrote, by the kind of growth."""
    found = {}
    for name, (growth, flags) in GROWTHS.items():
        folder = tmp_path_factory.mktemp(name)
        grow_model(str(small), folder / "large", SIZES | {"tied": False}, growth)
        import_model(str(folder / "large"), folder / "megatron")
        load = ["--load", str(folder / "megatron"), "--save", str(folder / "run")]
        epsilon = [*STUDENT, *flags[6:]]
        assert not run(1, *corpus.flags, *epsilon, *STILL, *load)
        found[name] = weights(folder / "run")
    assert found["pad"] != found["clone"]
    return found


@pytest.mark.parametrize(
    ("layout", "growth"), [*((layout, "pad") for layout in LAYOUTS), ("tp2_pp2_sp", "clone")]
)
def test_every_layout_starts_from_the_same(corpus, small, expected, tmp_path, layout, growth):
    ranks, flags = LAYOUTS[layout]
    init = ["--init-from", str(small), *GROWTHS[growth][1]]
    save = ["--save", str(tmp_path)]
    assert not run(ranks, *corpus.flags, *STUDENT, *STILL, *flags, *init, *save)
    assert weights(tmp_path) == expected[growth]


def test_heads_without_groups(corpus, tmp_path):
    """Megatron leaves a 1 as the number of groups then."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    config = LlamaConfig(vocab_size=VOCAB, num_attention_heads=4, rms_norm_eps=1e-6, **sizes)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "small")
    flags = [*corpus.flags, *STUDENT, *STILL, "--init-from", str(tmp_path / "small")]
    heads = ["--num-query-groups", "4"]
    assert not run(1, *flags, *heads, "--save", str(tmp_path / "run"))
    other = ["--load", str(tmp_path / "plain"), "--save", str(tmp_path / "plain")]
    assert not run(1, *corpus.flags, *STUDENT, *heads, *STILL, *other)
    error = run(1, *flags, *heads, *other)
    assert "no --init-from. It goes on from its own weights" in error
    import_model(str(tmp_path / "small"), tmp_path / "release")
    error = run(1, *flags, *heads, "--load", str(tmp_path / "release"))
    assert "has no effect: the run goes on from" in error


def test_a_tied_embedding_is_the_head_on_the_last_stage_too(corpus, tmp_path):
    """Tolerance 1e-5 of the first loss, which a head of its own would change by 0.01 and more."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-6}
    config = LlamaConfig(vocab_size=VOCAB, tie_word_embeddings=True, **sizes, **heads)
    model = LlamaForCausalLM(config)
    model.model.embed_tokens.weight.data *= 20  # far from what an untrained head would give
    model.save_pretrained(tmp_path / "small")
    tied = [flag for flag in FLAGS if flag != "--untie-embeddings-and-output-weights"]
    losses = []
    for ranks, layout in ((1, []), (2, "--pipeline-model-parallel-size 2".split())):
        save = tmp_path / str(ranks)
        flags = [*tied, *corpus.flags, *STUDENT, *STILL, *layout]
        flags += ["--init-from", str(tmp_path / "small"), "--save", str(save)]
        found = run_distributed("tests.distributed.training:train", ranks, flags)
        assert found == [None] * ranks
        losses.append(series(save, "lm loss")[1])
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)
    assert abs(losses[0] - math.log(VOCAB)) > 0.01


def test_it_starts_at_the_small_models_loss_and_goes_on_from_its_own(corpus, small, tmp_path):
    """Tolerance 1e-4. The teacher is the same model, whose loss on the first batch is noted."""
    init = ["--init-from", str(small)]
    one = "--micro-batch-size 8 --let-weight 1e-6".split()
    let = [*corpus.let(*one)[:-4], "--teacher-model", str(small), *one]
    save = ["--load", str(tmp_path), "--save", str(tmp_path)]
    flags = [*corpus.flags, *STUDENT, *let, *init, *save]
    assert not run(1, *flags, "--exit-interval", "4")
    start = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])
    loss = series(tmp_path, "lm loss")
    assert loss[1] == pytest.approx(start["teacher"]["lm_loss"], abs=1e-4)
    assert loss[4] != pytest.approx(loss[1], abs=1e-4)
    # A requeue repeats the flag: what is grown once is not grown again.
    assert not run(1, *flags)
    assert series(tmp_path, "lm loss")[5] == pytest.approx(loss[4], abs=0.5)
    assert series(tmp_path, "lm loss")[5] != pytest.approx(loss[1], abs=1e-4)
    error = run(1, *flags, "--init-depth", "stack")
    assert "--init-depth stack, the checkpoint" in error and "--init-depth identity" in error


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--init-depth stack", "--init-depth stack has no effect without --init-from"),
        (
            "--init-from {small}",
            "layernorm_epsilon=5e-07 (--norm-epsilon), the student layernorm_epsilon=1e-05",
        ),
        ("--init-from {small} --norm-epsilon 5e-7 --rotary-base 500", "has rotary_base=10000"),
        ("--init-from {wide} --norm-epsilon 5e-7", "--hidden-size 32 is smaller"),
        ("--init-from {other} --norm-epsilon 5e-7", "only llama and qwen2 can be grown"),
        ("--init-from /no/such", "is no folder, and the hub does not give it"),
        ("--init-from {small} --init-symmetry noise --norm-epsilon 5e-7", "has no effect with"),
        ("--init-from {small} --norm-epsilon 5e-7 --use-rope-scaling", "use_rope_scaling=False"),
        ("--init-from {small} --norm-epsilon 5e-7 --num-experts 2", "--num-experts goes with no"),
        ("--init-from {small} --pretrained-checkpoint x", "both say where weights come from"),
    ],
)
def test_what_cannot_be(corpus, small, tmp_path, flags, words):
    wide = save_tiny_teacher(tmp_path / "wide", vocab_size=VOCAB, width=48)
    other = save_tiny_teacher(tmp_path / "other", "gpt2", vocab_size=VOCAB, width=16)
    given = flags.format(small=small, wide=wide, other=other).split()
    error = run(1, *corpus.flags, *STILL, *given)
    assert error is not None and words in error


def test_a_tokenizer_of_any_kind_is_compared(corpus, tmp_path):
    (tmp_path / "text").write_text("a few words\nand a few more\n" * 20)
    SentencePieceTrainer.train(
        input=f"{tmp_path}/text", model_prefix=f"{tmp_path}/sp", vocab_size=16, minloglevel=2
    )
    small = Path(save_tiny_teacher(tmp_path / "small", vocab_size=VOCAB, width=16))
    shutil.copytree(corpus.folder / "tokenizer", small, dirs_exist_ok=True)
    flags = ["--mock-data", "--tokenizer-type", "SentencePieceTokenizer", *STUDENT, *STILL]
    error = run(1, *flags, "--tokenizer-model", f"{tmp_path}/sp.model", "--init-from", str(small))
    assert "number tokens differently" in error and "--init-from" in error


def test_a_damaged_tensor_that_one_stage_reads_ends_all(corpus, tmp_path):
    model = Path(save_tiny_teacher(tmp_path / "model", vocab_size=VOCAB, width=16))
    file = model / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.0.mlp.up_proj.weight"].fill_(math.nan)
    save_file(tensors, file, {"format": "pt"})
    flags = [*STUDENT, *STILL, "--init-from", str(model), "--pipeline-model-parallel-size", "2"]
    error = run(2, *corpus.flags, *flags, "--save", str(tmp_path / "run"))
    assert "model.layers.0.mlp.up_proj.weight" in error
