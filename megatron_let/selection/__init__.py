"""SALT_DS: scores a run's training samples with a small model and selects."""
