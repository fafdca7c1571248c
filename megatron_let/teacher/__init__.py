"""The small frozen model that guides the student: loading, checks, forward pass."""
