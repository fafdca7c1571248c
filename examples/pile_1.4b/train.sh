#!/usr/bin/env bash
# 1.4 B parameters on 20 B tokens of the Pile, the paper's main size, on 32 A100-80GB:
#
#   DATA=/data/pile SAVE=/checkpoints METHOD=let TEACHER=smollm-135m examples/pile_1.4b/train.sh
#
# METHOD: baseline, let, salt, reverse-kd, let+salt. TEACHER: smollm-135m, opt-125m, pythia-160m (the
# paper's), gpt2 (its weak case). More flags may follow; PRINT=1 shows them all instead of running.
# INIT=grow: the student starts as SmolLM-135M, grown (docs/growth.md), with any METHOD; plain by default.
size=1.4b
default_teacher=smollm-135m
# The paper gives no shapes; this one has 1.416 B parameters with 49,152 tokens, and heads of 128.
model=(--num-layers 24 --hidden-size 2048 --ffn-hidden-size 5504 --num-attention-heads 16)
# A shape that SmolLM's 30 layers, 9/3 heads of 64 and tied embeddings can grow into: 1.43 B.
grown=(--num-layers 30 --hidden-size 2048 --ffn-hidden-size 5504 --num-attention-heads 32
    --group-query-attention --num-query-groups 8 --kv-channels 64)
# A rank holds all of it: 40 GiB with 8 rows at once and the optimizer dealt over 32 ranks, so nothing
# is gained by cutting layers or the pipeline. 512 / (8 x 32) = 2 micro-batches.
layout=(--tensor-model-parallel-size 1 --pipeline-model-parallel-size 1)
batch=(--micro-batch-size 8)
peak_lr=3e-4 # LLaMA's for 7 B; the paper is silent
min_lr=3e-5
source "$(dirname "${BASH_SOURCE[0]}")/../pile/train.sh"
