"""Makes the virtual environment ``.venv-peers`` with what benchmarks and ``parity/`` compare with.

FuxiCTR 2.3.10 does not run with Polars 1.30 or later, so that it cannot live beside mldcn. There mldcn's modules
are imported from ``src`` alone; they need PyTorch, pydantic and PyYAML. DeepCTR-Torch, torch-rechub and torchrec
come without what they require, since only their layers are used.

Usage: python benchmarks/peers.py
"""

from __future__ import annotations

import subprocess
import sys
import venv

from turns import PEER_PYTHON

# PyTorch goes first and alone, in exactly this version, so that a CPU build on offer is taken.
STEPS = (
    ["torch==2.13.0"],
    ["fuxictr==2.3.10", "polars<1.30"],
    ["pydantic>=2.11,<3", "pyyaml>=6.0.2,<7", "safetensors", "pytest>=8.4,<10"],
    ["--no-deps", "deepctr-torch==0.3.0", "torch-rechub==0.9.0", "torchrec==1.8.0", "fbgemm-gpu-cpu==1.8.0"],
    ["tensordict", "iopath", "pyre-extensions", "torchmetrics"],
)


def main() -> None:
    """Installs, unless the same was done before."""
    folder = PEER_PYTHON.parent.parent
    done = folder / "installed"
    steps = "\n".join(" ".join(packages) for packages in STEPS)
    if done.exists() and done.read_text() == steps:
        print(f"{folder}: there already")
        return
    venv.create(folder, with_pip=True, clear=True)
    for packages in STEPS:
        command = [str(PEER_PYTHON), "-m", "pip", "--disable-pip-version-check", "install", "-q", *packages]
        if subprocess.run(command).returncode:
            sys.exit(f"{folder}: could not install {' '.join(packages)}")
    done.write_text(steps)
    print(f"{folder}: made")


if __name__ == "__main__":
    main()
