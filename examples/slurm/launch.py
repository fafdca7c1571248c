"""torchrun, but for its status: that of the rank that failed first. torchrun's own is always 1."""

import sys

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main

if __name__ == "__main__":
    try:
        main()
    except ChildFailedError as error:
        print(error, file=sys.stderr)
        sys.exit(max(error.get_first_failure()[1].exitcode, 1))  # negative: a signal's number
