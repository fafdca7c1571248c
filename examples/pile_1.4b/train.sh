#!/usr/bin/env bash
# 1.4 B parameters on 20 B tokens of the Pile, the paper's main size, on 32 A100-80GB:
#
#   DATA=/data/pile SAVE=/checkpoints METHOD=let TEACHER=smollm-135m examples/pile_1.4b/train.sh
#
# METHOD: baseline, let, salt, reverse-kd, let+salt. TEACHER: smollm-135m, opt-125m, pythia-160m (the
# paper's), gpt2 (its weak case). More flags may follow; PRINT=1 shows them all instead of running.
# INIT=grow: the student starts as SmolLM-135M or another SMALL (a folder or an id), grown
# (docs/growth.md), with any METHOD; plain by default.
size=1.4b
default_teacher=smollm-135m
source "$(dirname "${BASH_SOURCE[0]}")/../pile/train.sh"
