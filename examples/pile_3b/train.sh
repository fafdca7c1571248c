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
source "$(dirname "${BASH_SOURCE[0]}")/../pile/train.sh"
