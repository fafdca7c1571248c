"""Each file is a command; `recipes.py` and what they share are imported by tests too."""
