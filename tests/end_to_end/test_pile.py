"""The commands for the Pile, on a small corpus in its format, up to training on the blend."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import zstandard

from tests.unit.data.test_preprocess import make_records, save_tokenizer

ROOT = Path(__file__).resolve().parents[2]
SUBSETS = ["Pile-CC", "Wikipedia (en)", "PubMed Abstracts"]
MODEL = (
    "--cpu --num-layers 2 --hidden-size 32 --num-attention-heads 2 --seq-length 32 "
    "--max-position-embeddings 32 --micro-batch-size 2 --global-batch-size 2 --train-iters 2 "
    "--log-interval 1 --lr 1e-3 --eval-iters 1 --eval-interval 2 "
    "--tokenizer-type HuggingFaceTokenizer"
)


def write_pile(folder: Path) -> None:
    records = make_records(400)
    for number, record in enumerate(records):
        record["meta"] = {"pile_set_name": SUBSETS[number % 5 % 3]}
    (folder / "train").mkdir(parents=True)
    parts = {"train/00": records[:150], "train/01": records[150:300], "val": records[300:350]}
    for name, part in (parts | {"test": records[350:]}).items():
        text = "".join(json.dumps(record) + "\n" for record in part)
        (folder / f"{name}.jsonl.zst").write_bytes(zstandard.compress(text.encode()))


def call(*command: object) -> str:
    done = subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, env=os.environ
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_shards_become_a_blend_that_trains(tmp_path: Path) -> None:
    write_pile(tmp_path / "pile")
    tokenizer = save_tokenizer(tmp_path / "tokenizer")
    command = [ROOT / "examples" / "pile" / "preprocess.sh", tmp_path / "pile", tokenizer]
    command += [tmp_path / "data", 2]
    call(*command)
    blend = (tmp_path / "data" / "pile_text_blend.txt").read_text().split()
    weights, prefixes = np.array(blend[::2], int), blend[1::2]
    assert [Path(prefix).name for prefix in prefixes] == [
        f"pile_{name}_text_document" for name in ("Pile-CC", "Wikipedia-en", "PubMed-Abstracts")
    ]
    sizes = [json.loads(Path(f"{prefix}.json").read_text())["tokens"] for prefix in prefixes]
    assert weights.tolist() == sizes
    assert call(*command).count("is there") == 3
    data = f"--data-args-path {tmp_path}/data/pile_text_blend.txt --split 90,10,0"
    flags = f"{MODEL} --tokenizer-model {tokenizer} {data} --data-cache-path {tmp_path}/cache"
    (tmp_path / "run.flags").write_text(flags)
    tool = ROOT / "tools" / "prepare_cache.py"
    cached = call(sys.executable, tool, f"@{tmp_path}/run.flags")
    assert "train: " in cached and cached.rstrip().endswith(f"Caches are in {tmp_path}/cache")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").iterdir()}
    assert "> step 2/2 " in call(sys.executable, ROOT / "pretrain_let.py", *flags.split())
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").iterdir()} == before
