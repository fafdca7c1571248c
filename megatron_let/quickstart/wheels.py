"""Fetch the pinned wheels whose text is trained on: unpacked, nothing is installed or run."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from megatron_let.conversion.output import complete_or_absent

WHEELS = Path(__file__).with_name("wheels.txt")
"""Names with versions and SHA-256 sums, which pip checks."""
TEXT = Path("runs/text")
"""Where they are kept, once for all examples, in the folder where they were called."""
ENDINGS = (".py", "README.md")
"""Files to unpack: Python sources, and what people wrote about them."""


def fetch_wheels(
    wheels: Path = WHEELS, folder: Path = TEXT, endings: tuple[str, ...] = ENDINGS
) -> list[Path]:
    """Return a folder of files for each wheel of a list, in the order of their names.

    What is there is taken as it is. Exits with pip's words if a wheel is not to be had, or is not
    the one that the list means.
    """
    sources = folder / wheels.stem
    if not sources.exists():
        with complete_or_absent(sources) as partial:
            downloads = partial / "wheels"
            pip = [sys.executable, "-m", "pip", "download", "-qq", "--disable-pip-version-check"]
            # The same files for every platform and Python that asks.
            wanted = "--no-deps --only-binary :all: --platform any --python-version 3.14".split()
            command = [*pip, *wanted, "--require-hashes", "-r", str(wheels), "-d", str(downloads)]
            if subprocess.run(command).returncode:
                sys.exit(f"The wheels of {wheels} are not all there; pip says why above.")
            for wheel in downloads.glob("*.whl"):
                with zipfile.ZipFile(wheel) as archive:
                    # A lone module beside a package is of the same project: not split from it.
                    names = [n for n in archive.namelist() if "/" in n and n.endswith(endings)]
                    archive.extractall(partial / wheel.name.split("-")[0].lower(), names)
            shutil.rmtree(downloads)
    return sorted(sources.iterdir())
