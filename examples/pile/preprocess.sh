#!/usr/bin/env bash
# The Pile to .bin/.idx pairs, one per subset, and the blend to train on.
#
#   examples/pile/preprocess.sh FOLDER TOKENIZER OUTPUT [WORKERS]
#
#   FOLDER     holds train/00.jsonl.zst ... 29.jsonl.zst, val.jsonl.zst and test.jsonl.zst
#   TOKENIZER  a tokenizer folder or Hugging Face id
#   OUTPUT     gets pile_SUBSET_text_document.{bin,idx,json} and pile_text_blend.txt for training,
#              valid_text_document and test_text_document
#
# Killed, the same call goes on where it was; what is complete is not done again.
set -euo pipefail
folder=${1:?a folder with train/*.jsonl.zst} tokenizer=${2:?a tokenizer} output=$(realpath -m "${3:?a folder}")
workers=${4:-$(nproc)}
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
python=$here/.venv/bin/python
[[ -x $python ]] || python=python
if [[ $output =~ [[:space:]] ]]; then
    echo "$output: a path with a blank cannot be part of a blend of data" >&2
    exit 1
fi
mkdir -p "$output"

preprocess() { # PREFIX LAST_FILE INPUT [FLAGS]
    local prefix=$1 last=$2 input=$3
    shift 3
    if [[ -e $last ]]; then
        echo "$last is there"
        return
    fi
    "$python" "$here/tools/preprocess_data.py" --input "$input" --output-prefix "$prefix" \
        --tokenizer-model "$tokenizer" --append-eod --workers "$workers" "$@"
}

preprocess "$output/pile" "$output/pile_text_blend.txt" "$folder/train/*.jsonl.zst" \
    --split-by-meta pile_set_name --on-error skip
preprocess "$output/valid" "$output/valid_text_document.idx" "$folder/val.jsonl.zst"
preprocess "$output/test" "$output/test_text_document.idx" "$folder/test.jsonl.zst"
"$python" "$here/tools/inspect_data.py" "$output/valid_text_document"
echo
echo "Train with --data-args-path $output/pile_text_blend.txt --split 1,0,0, or with"
echo "--train-data-path \$(cat $output/pile_text_blend.txt) \\"
echo "--valid-data-path $output/valid_text_document --test-data-path $output/test_text_document"
