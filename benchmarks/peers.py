"""Makes the virtual environment ``.venv-peers`` with what the benchmarks compare with.

FuxiCTR 2.3.10 does not run with Polars 1.30 or later, so that it cannot live beside mldcn.

Usage: python benchmarks/peers.py
"""

from __future__ import annotations

import subprocess
import sys
import venv

from turns import PEER_PYTHON

# PyTorch goes first and alone, in exactly this version, so that a CPU build on offer is taken.
STEPS = (["torch==2.13.0"], ["fuxictr==2.3.10", "polars<1.30"])


def main() -> None:
    """Installs, unless it was done before."""
    folder = PEER_PYTHON.parent.parent
    done = folder / "installed"
    if done.exists():
        print(f"{folder}: there already")
        return
    venv.create(folder, with_pip=True, clear=True)
    for packages in STEPS:
        command = [str(PEER_PYTHON), "-m", "pip", "--disable-pip-version-check", "install", "-q", *packages]
        if subprocess.run(command).returncode:
            sys.exit(f"{folder}: could not install {' '.join(packages)}")
    done.touch()
    print(f"{folder}: made")


if __name__ == "__main__":
    main()
