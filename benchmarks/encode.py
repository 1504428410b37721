"""Rows a second of encoding a Criteo-shaped CSV (13 numbers, 26 ids): FuxiCTR, mldcn, Polars only parsing it.

    python benchmarks/peers.py        # once
    python benchmarks/encode.py

Each side reads the CSV, fits its vocabularies and scales, and writes encoded rows; what starts its process (and
FuxiCTR's Ray) is not counted. Every column's vocabulary takes all ids that occur.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from logs import write_log
from turns import PEER_PYTHON, Result, Side, alternate, machine, ratios, report, shown, spread


def measure(rows: int, rounds: int, threads: int, peers: bool) -> Result:
    """Starts the sides and times their turns."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        log = folder / "log.csv"
        write_log(log, rows)
        given = ["--log", log, "--folder"]
        sides = [
            Side("mldcn", ["mldcn_side.py", "encode", *given, folder / "m"], threads, folder / "m.log"),
            Side("polars", ["mldcn_side.py", "parse", *given, folder / "p"], threads, folder / "p.log"),
        ]
        if peers:
            command = ["fuxictr_side.py", "encode", *given, folder / "f"]
            sides.append(Side("fuxictr", command, threads, folder / "f.log", PEER_PYTHON))
        results = alternate(sides, rounds, warm=0)
        for side in sides:
            side.close()
    for turns in results.values():
        for turn in turns:
            turn["rate"] = rows / turn["seconds"]
    found: Result = {
        "machine": machine(threads),
        "rows": rows,
        "ids": results["mldcn"][0]["ids"],
        "versions": {side.name: side.about for side in sides},
        "rows_per_second": {name: spread([t["rate"] for t in turns]) for name, turns in results.items()},
        "mldcn_to_polars": ratios(results, "mldcn", "polars", "rate"),
    }
    if peers:
        found["mldcn_to_fuxictr"] = ratios(results, "mldcn", "fuxictr", "rate")
    return found


def main() -> None:
    """Prints the rates and their ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rows", type=int, default=500_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--no-peers", action="store_true", help="without FuxiCTR")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    found = measure(options.rows, options.rounds, options.threads, not options.no_peers)
    print(f"{found['rows']:,} rows x 39, {found['ids']:,} ids; {found['machine']}; {found['versions']}")
    for name, rate in found["rows_per_second"].items():
        print(f"{name:10} {shown(rate)} rows/s")
    for name in ("mldcn_to_fuxictr", "mldcn_to_polars"):
        if name in found:
            print(f"{name}: {shown(found[name], 2)}")
    report(found, options.json)


if __name__ == "__main__":
    main()
