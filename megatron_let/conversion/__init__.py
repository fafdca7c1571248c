"""Checkpoints of a run to folders that Hugging Face's libraries load."""
