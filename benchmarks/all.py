"""Every benchmark in turn, their figures in one file.

    python benchmarks/peers.py                             # once
    python benchmarks/all.py --json docs/results/speed.json

Some 20 minutes on 2 cores and 12 GB of memory. Have the machine do nothing else.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from turns import HERE, report

PARTS = {
    "encode": ["encode.py"],
    "train": ["dcnv2.py", "train"],
    "predict": ["dcnv2.py", "predict"],
    "profile": ["dcnv2.py", "profile"],
    "table_optim": ["table_optim.py", "--threads", "2", "--rounds", "11"],
    "metrics": ["metrics.py"],
    "startup": ["startup.py"],
    "block": ["block.py"],
}


def main() -> None:
    """Runs them all, or those named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)}; all by default")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"no benchmark is called {', '.join(unknown)}")
    # A later run of some parts keeps the others' figures.
    found = json.loads(options.json.read_text()) if options.json and options.json.exists() else {}
    failed = []
    for name in options.parts or PARTS:
        script, *arguments = PARTS[name]
        print(f"== {name}", flush=True)
        start = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "found.json"
            command = [sys.executable, str(HERE / script), *arguments, "--json", str(path)]
            if subprocess.run(command).returncode:
                failed.append(name)
                continue
            found[name] = json.loads(path.read_text()) | {"took_seconds": round(time.perf_counter() - start)}
        report(found, options.json)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
