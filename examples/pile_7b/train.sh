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
source "$(dirname "${BASH_SOURCE[0]}")/../pile/train.sh"
