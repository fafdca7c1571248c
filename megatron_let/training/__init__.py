"""One training run: its command line, its loop's callbacks, and what it records."""
