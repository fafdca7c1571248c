"""The real program on tensors that have shapes and no contents: `--dry-run`."""
