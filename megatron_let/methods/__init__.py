"""How to train: each method is a row of `table.py`."""
