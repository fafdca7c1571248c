#!/usr/bin/env bash
# 7 B parameters on 20 B tokens of the Pile, the paper's largest size, on 32 A100-80GB:
#
#   DATA=/data/pile SAVE=/checkpoints METHOD=let TEACHER=llama-3.2-1b examples/pile_7b/train.sh
#
# The teacher's vocabulary of 128,256 makes it 7.5 B (6.9 B with 50 k). Sources disagree on the paper's
# teacher for this size; its reviewers name Llama-3.2-1B. More flags may follow; PRINT=1 shows
# them all instead of running.
size=7b
default_teacher=llama-3.2-1b
# The paper gives no shapes; this is LLaMA's 7 B.
model=(--num-layers 32 --hidden-size 4096 --ffn-hidden-size 11008 --num-attention-heads 32)
# TP 2 stays on NVLink. Two stages: LET's teacher works on the first, where the output layer of 128,256
# rows does not, so that it is nearly free (tools/plan.py). 512 / (4 x 8) = 16 micro-batches; with
# two chunks a rank the bubble is 1 / 33 of a step.
layout=(
    --tensor-model-parallel-size 2 --sequence-parallel --pipeline-model-parallel-size 2
    --num-virtual-stages-per-pipeline-rank 2
)
batch=(--micro-batch-size 4)
peak_lr=3e-4 # LLaMA's for this size; the paper is silent
min_lr=3e-5
source "$(dirname "${BASH_SOURCE[0]}")/../pile/train.sh"
