"""Seconds of ``import mldcn`` and ``mldcn --help``, in turn with starting Python alone.

Usage: python benchmarks/startup.py
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

from turns import Result, machine, report, shown, spread

HELP = "import sys; sys.argv = ['mldcn', '--help']; from mldcn.cli import main; main()"
COMMANDS = {"python": "", "import mldcn": "import mldcn", "mldcn --help": HELP}


def seconds(code: str) -> float:
    """Wall time of a fresh interpreter."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - start


def main() -> None:
    """Prints a line a command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    taken: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for i in range(options.rounds + 1):
        for name, code in COMMANDS.items():
            elapsed = seconds(code)
            if i:  # the first round fills the disk's cache
                taken[name].append(elapsed)
    found: Result = {
        "machine": machine(1),
        "seconds": {name: spread(values) for name, values in taken.items()},
    }
    for name, values in found["seconds"].items():
        print(f"{name:14} {shown(values, 3)} s")
    report(found, options.json)


if __name__ == "__main__":
    main()
