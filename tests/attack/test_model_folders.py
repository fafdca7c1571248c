"""Models of strangers: links that lead out, downloads that broke off, headers that lie, pickles.

Whatever loads a model goes through `hugging_face.load` or `SafetensorsReader`.
"""

import contextlib
import json
import os
import pickle
import shutil
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_let import hugging_face
from megatron_let.conversion.safetensors_files import SafetensorsReader
from megatron_let.errors import UsageError
from megatron_let.teacher.load import load_causal_lm, read_teacher_config, read_token_ids
from tests.support.testing import run_program, save_tiny_teacher

ROOT = Path(__file__).resolve().parents[2]
WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return save_tiny_teacher(tmp_path_factory.mktemp("model"), width=16)


@pytest.fixture
def folder(teacher, tmp_path):
    """A copy to spoil."""
    return Path(shutil.copytree(teacher, tmp_path / "model"))


def as_teacher(folder):
    load_causal_lm(read_teacher_config(str(folder)), torch.float32, torch.device("cpu"))


def as_source(folder):
    reader = SafetensorsReader(folder, "model")
    for name in reader.names:
        reader.read(name)


DOORS = pytest.mark.parametrize("door", [as_teacher, as_source])

# --- weights that are not whole -----------------------------------------------------------------


def header(declared: int, text: bytes) -> bytes:
    return struct.pack("<Q", declared) + text


def shape(*sizes: int) -> bytes:
    entry = {"dtype": "F32", "shape": sizes, "data_offsets": [0, 4]}
    text = json.dumps({"model.norm.weight": entry}).encode()
    return header(len(text), text) + b"\0" * 4


TORN = {
    "empty": (lambda whole: b"", "it is empty"),
    "half": (lambda whole: whole[: len(whole) // 2], "cut off"),
    "a few bytes": (lambda whole: whole[:5], "cut off"),
    "Git LFS pointer": (
        lambda whole: b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 134\n",
        "Git LFS",
    ),
    "error page": (lambda whole: b"\n<!DOCTYPE html><title>404</title>", "web page"),
    "header of 2^60 bytes": (lambda whole: header(1 << 60, b"{}"), "cut off"),
    "header of 99 MB": (lambda whole: header(99_000_000, b"{}"), "cut off"),
    "nested header": (lambda whole: header(100_000, b"[" * 100_000), "damaged"),
    "shape that overflows": (lambda whole: shape(1 << 40, 1 << 40), "damaged"),
    "shape of the largest numbers": (lambda whole: shape((1 << 64) - 1, 2), "damaged"),
    "shape of another size": (lambda whole: shape(1 << 40), "damaged"),
    "pickle": (lambda whole: pickle.dumps({"a": 1}), "damaged"),
}


@DOORS
@pytest.mark.parametrize("kind", TORN)
def test_torn_weights_are_named(kind, door, folder):
    make, told = TORN[kind]
    path = folder / WEIGHTS
    path.write_bytes(make(path.read_bytes()))
    with pytest.raises(UsageError, match=f"{WEIGHTS} cannot be read: .*{told}") as error:
        door(folder)
    assert len(str(error.value).splitlines()) == 1


@DOORS
@pytest.mark.parametrize(
    "text", ["", "<html>", "[]", '{"weight_map": 3}', '{"weight_map": {"a": 1}}', "[" * 100_000]
)
def test_an_index_that_is_none_is_named(text, door, folder):
    (folder / f"{WEIGHTS}.index.json").write_text(text)
    with pytest.raises(UsageError, match=r"model.safetensors.index.json is no index of weights"):
        door(folder)


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "tokenizer.json"])
@pytest.mark.parametrize("text", [b"", b"<html>", b"[]", b"\xff\xfe", b"[" * 100_000])
def test_a_configuration_that_is_none_ends_in_a_sentence(name, text, folder):
    (folder / name).write_bytes(text)
    with pytest.raises(UsageError, match="--teacher-model .*/model") as error:
        read_teacher_config(str(folder))
        read_token_ids(str(folder))
    assert len(str(error.value).splitlines()) == 1


# --- pickles ------------------------------------------------------------------------------------


class Calls:
    """Makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def old_torch(payload: object) -> bytes:
    """What `torch.save` wrote before it wrote zip files."""
    return b"".join(map(pickle.dumps, (0x1950A86A20F9469CFC6C, 1001, {}, payload, [])))


@pytest.mark.parametrize("kind", ["zip", "old", "bare"])
def test_pickled_weights_execute_nothing(kind, folder, tmp_path):
    tensors, path = load_file(folder / WEIGHTS), folder / "pytorch_model.bin"
    payload = tensors | {"model.norm.weight": Calls(tmp_path / "made")}
    if kind == "zip":
        torch.save(payload, path)
    else:
        path.write_bytes(old_torch(payload) if kind == "old" else pickle.dumps(payload))
    (folder / WEIGHTS).unlink()
    with pytest.raises(UsageError, match=path.name) as error:
        as_teacher(folder)
    assert len(str(error.value).splitlines()) == 1
    assert not (tmp_path / "made").exists()
    if kind == "zip":  # twin: the payload works
        torch.load(path, weights_only=False)
        assert (tmp_path / "made").exists()


ANY_FILE = (
    *hugging_face.TOKENIZER_FILES,
    *("config.json", "generation_config.json", "processor_config.json", "adapter_config.json"),
    *(WEIGHTS, f"{WEIGHTS}.index.json", "pytorch_model.bin.index.json", "tf_model.h5"),
    *("vocab.pkl", "training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth"),
)


@pytest.mark.parametrize("name", ANY_FILE)
def test_a_pickle_in_any_file_executes_nothing(name, folder, tmp_path):
    (folder / name).write_bytes(pickle.dumps(Calls(tmp_path / "made")))
    for door in (as_teacher, as_source, lambda path: read_token_ids(str(path))):
        with contextlib.suppress(UsageError):
            door(folder)
        assert not (tmp_path / "made").exists()
    pickle.loads((folder / name).read_bytes())  # twin: the payload works
    assert (tmp_path / "made").exists()


def test_pickled_weights_of_tensors_alone_load(folder):
    torch.save(load_file(folder / WEIGHTS), folder / "pytorch_model.bin")
    (folder / WEIGHTS).unlink()
    as_teacher(folder)


# --- links --------------------------------------------------------------------------------------


@pytest.fixture
def secret(tmp_path, teacher):
    """A file of the user's, outside of the model's folder."""
    path = tmp_path / "private" / "secret.json"
    path.parent.mkdir()
    path.write_text("{}")
    return path


@pytest.mark.parametrize("name", ["tokenizer.json", "vocab.json", "merges.txt", "tokenizer"])
def test_links_out_of_the_folder_are_not_followed(name, folder, secret, tmp_path):
    (folder / name).symlink_to(
        secret.parent if name == "tokenizer" else f"../private/{secret.name}"
    )
    with pytest.raises(UsageError, match=f"{name} leads out of the folder"):
        read_token_ids(str(folder))
        read_teacher_config(str(folder))
    argv = ["from-hf", "--hf-model", str(folder), "--output", str(tmp_path / "out")]
    result = run_program(str(ROOT / "tools/convert_checkpoint.py"), *argv)
    assert result.returncode == 2 and f"{name} leads out of the folder" in result.stderr
    assert not (tmp_path / "out").exists()


@DOORS
@pytest.mark.parametrize("name", ["../private/w.safetensors", "ABSOLUTE/w.safetensors", "link"])
def test_an_index_cannot_lead_out_of_the_folder(name, door, folder, secret):
    outside = secret.parent / "w.safetensors"
    (folder / WEIGHTS).rename(outside)
    (folder / "link").symlink_to(outside)
    name = name.replace("ABSOLUTE", str(secret.parent))
    files = dict.fromkeys(load_file(outside), name)
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": files}))
    with pytest.raises(UsageError, match="leads out of the folder"):
        door(folder)


def test_a_folder_may_be_a_link_and_link_to_itself(folder, tmp_path):
    (folder / WEIGHTS).rename(folder / "v1.safetensors")
    (folder / WEIGHTS).symlink_to("v1.safetensors")
    (tmp_path / "link").symlink_to(folder)
    as_teacher(tmp_path / "link")
    as_source(tmp_path / "link")


@pytest.mark.parametrize("shared", [False, True])
def test_the_hubs_cache_of_links_works(shared, folder, tmp_path):
    """A snapshot links into its model's blobs, and those into blobs that all models share."""
    cache = tmp_path / "hub"
    model = cache / "models--a--b"
    snapshot, blobs = model / "snapshots" / "0123", model / "blobs"
    (cache / "blobs" / "ab").mkdir(parents=True)
    for made in (snapshot, blobs):
        made.mkdir(parents=True)
    for number, path in enumerate(sorted(folder.iterdir())):
        if shared:
            path.rename(cache / "blobs" / "ab" / str(number))
            (blobs / str(number)).symlink_to(f"../../blobs/ab/{number}")
        else:
            path.rename(blobs / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    as_teacher(snapshot)
    as_source(snapshot)

    other = cache / "models--c--d" / "blobs" / "0"
    other.parent.mkdir(parents=True)
    other.write_text("{}")
    (snapshot / "vocab.json").symlink_to(other)
    with pytest.raises(UsageError, match="vocab.json leads out"):
        as_teacher(snapshot)


def test_the_door_loads_what_is_sound(teacher):
    assert hugging_face.load(AutoModelForCausalLM, teacher, "fails").config.hidden_size == 16
    with pytest.raises(UsageError, match=r"^fails \(.+\)$"):
        hugging_face.load(AutoTokenizer, teacher / "nowhere", "fails")
