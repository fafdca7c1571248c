"""A pre-training run on paper: parameters, FLOPs, memory per rank, stage balance, days.

`plan.plan` puts it together from a student and a teacher (`shapes`), a parallel layout (`layout`)
and a run (`run`); `text` writes the page. Plain arithmetic: neither torch nor Megatron is imported.
"""
