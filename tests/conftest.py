"""For all tests: no progress bars in what they capture, as the tools have it without a terminal."""

import os

os.environ.setdefault("TQDM_DISABLE", "1")  # read when tqdm is imported
