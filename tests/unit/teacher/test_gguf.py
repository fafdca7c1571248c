"""Teachers in llama.cpp's form, one file with everything."""

import gguf
import numpy as np
import pytest
import torch

from megatron_let.errors import UsageError
from megatron_let.teacher.load import load_causal_lm, read_teacher_config, read_token_ids
from tests.support import tokenizers_of_ours as ours

WIDTH, FFN, HEADS, LAYERS = 32, 64, 4, 2


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """A random Llama with a byte-level tokenizer; its embedding and norms as they were written."""
    path = tmp_path_factory.mktemp("gguf") / "small.gguf"
    vocabulary = ours.byte_level(300).get_vocab()
    tokens = sorted(vocabulary, key=vocabulary.get)
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(64)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_merges(["t h"])
    writer.add_bos_token_id(vocabulary[ours.END])
    writer.add_eos_token_id(vocabulary[ours.END])
    dice = np.random.default_rng(0)
    shapes = {"token_embd": (len(tokens), WIDTH), "output_norm": (WIDTH,)}
    for i in range(LAYERS):
        shapes |= {f"blk.{i}.{name}_norm": (WIDTH,) for name in ("attn", "ffn")}
        names = ("attn_q", "attn_k", "attn_v", "attn_output")
        shapes |= {f"blk.{i}.{name}": (WIDTH, WIDTH) for name in names}
        shapes |= {f"blk.{i}.{name}": (FFN, WIDTH) for name in ("ffn_gate", "ffn_up")}
        shapes |= {f"blk.{i}.ffn_down": (WIDTH, FFN)}
    weights = {
        n: 0.1 * dice.standard_normal(s, np.float32) + (len(s) == 1) for n, s in shapes.items()
    }
    for name, weight in weights.items():
        writer.add_tensor(f"{name}.weight", weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path, weights, vocabulary


def test_configuration_weights_and_tokens(file):
    path, weights, vocabulary = file
    config = read_teacher_config(str(path))
    assert (config.num_layers, config.hidden_size, config.context) == (LAYERS, WIDTH, 64)
    assert read_token_ids(str(path)).items() >= vocabulary.items()
    model = load_causal_lm(config, torch.float32, torch.device("cpu"))
    found = dict(model.named_parameters())
    for ours_, theirs in (
        ("model.embed_tokens", "token_embd"),
        ("model.norm", "output_norm"),
        ("model.layers.1.mlp.down_proj", "blk.1.ffn_down"),
        ("model.layers.0.self_attn.v_proj", "blk.0.attn_v"),
    ):
        assert torch.equal(found[f"{ours_}.weight"], torch.from_numpy(weights[theirs]))


def test_a_damaged_file_is_told(file, tmp_path):
    path = tmp_path / "cut.gguf"
    path.write_bytes(file[0].read_bytes()[:5000])
    with pytest.raises(UsageError, match="cut.gguf is not a readable model"):
        read_teacher_config(str(path))
