"""For all tests: one thread each, and no progress bars in what they capture, as without a terminal.

Models of these sizes are no work to share: two threads wait for one another, most of all where two
workers of pytest have the machine.
"""

import os

os.environ.setdefault("TQDM_DISABLE", "1")  # read when tqdm is imported
os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when numpy and torch are imported
