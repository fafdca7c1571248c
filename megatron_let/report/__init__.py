"""Reading finished runs and saying, in numbers and in one picture, how much a method saved.

`runs` reads a run's `metrics.jsonl`, `targets` defines *steps to target*, `table` and `plot` show
it. Standard library only; matplotlib is imported when a picture is drawn.
"""
