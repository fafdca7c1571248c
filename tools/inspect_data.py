"""`megatron-let inspect`, from a checkout."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_let.commands.inspect_data import main  # noqa: E402

if __name__ == "__main__":
    main()
