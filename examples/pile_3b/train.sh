#!/usr/bin/env bash
# 2.8 B parameters on 20 B tokens of the Pile, the size that the paper's 1.4 B is held against, on 32
# A100-80GB:
#
#   DATA=/data/pile SAVE=/checkpoints METHOD=baseline examples/pile_3b/train.sh
#
# SALT's own pair (arXiv 2410.18779) is a teacher of 1.5 B for a student of 2.8 B. Train it with
# examples/pile_1.4b, METHOD=baseline, export it, and give the folder:
#
#   METHOD=salt TEACHER=/exported/pile_1.4b TOKENIZER=smollm-135m ... examples/pile_3b/train.sh
#
# More flags may follow; PRINT=1 shows them all instead of running.
size=3b
default_teacher=smollm-135m
# The paper gives no shapes; this one has 2.79 B parameters with 49,152 tokens, and heads of 128.
model=(--num-layers 32 --hidden-size 2560 --ffn-hidden-size 6912 --num-attention-heads 20)
# Two stages: a teacher of 1.4 B fits beside half of the student, and LET's works on the stage
# without the output layer. 512 / (4 x 16) = 8 micro-batches; with two chunks a rank the bubble is
# 1 / 17 of a step.
layout=(
    --tensor-model-parallel-size 1 --pipeline-model-parallel-size 2
    --num-virtual-stages-per-pipeline-rank 2
)
batch=(--micro-batch-size 4)
peak_lr=3e-4 # LLaMA's for 7 B; the paper is silent
min_lr=3e-5
source "$(dirname "${BASH_SOURCE[0]}")/../pile/train.sh"
