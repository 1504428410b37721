"""Training and prediction with DCN-V2: mldcn, FuxiCTR, and the ceiling that matrix products set.

    python benchmarks/peers.py                 # once
    python benchmarks/dcnv2.py train
    python benchmarks/dcnv2.py predict
    python benchmarks/dcnv2.py profile         # where mldcn's training time goes

39 fields x 16, 3 full-rank cross layers beside an MLP of 400 and 400, batches of 4096, Adam, gradients clipped.
Both sides read their own encoded rows of one log; loading is counted. FuxiCTR has two loaders: the one that is
faster in the first round, which warms up, stays. The ceiling is the rate of nothing but the model's matrix
products (for training the three that each layer needs), on the same threads, in turn with the others.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from logs import write_log
from turns import PEER_PYTHON, Result, Side, alternate, machine, ratios, report, shown, spread

BATCH = 4096
STEPS = 20  # a turn's training steps: mldcn reports so often


def start(options: argparse.Namespace, folder: Path) -> list[Side]:
    """The sides, each with its encoded rows."""
    log, work = folder / "log.csv", options.work
    write_log(log, options.rows)
    common = ["--steps", STEPS, "--threads", options.threads]
    products = "products" if work == "train" else "products-forward"
    command = ["mldcn_side.py", work, *given(options, folder)]
    sides = [Side("mldcn", command, options.threads, folder / "mldcn.log")]
    if work == "profile":
        return sides
    if work == "predict":
        command = ["mldcn_side.py", "predict-raw", *given(options, folder)]
        sides.append(Side("mldcn, raw log", command, options.threads, folder / "raw.log"))
    command = ["mldcn_side.py", products, *common]
    sides.append(Side("ceiling", command, options.threads, folder / "ceiling.log"))
    if not options.no_peers:
        peer = ["--folder", folder / "fuxictr", *common]
        command = ["fuxictr_side.py", "encode-ids", "--log", log, *peer]
        encoder = Side("encoder", command, options.threads, folder / "encoder.log", PEER_PYTHON)
        encoder.turn()
        encoder.close()
        for loader in ("npz", "parquet"):
            name = f"fuxictr, {loader}"
            command = ["fuxictr_side.py", work, *peer, "--loader", loader]
            sides.append(Side(name, command, options.threads, folder / f"{loader}.log", PEER_PYTHON))
    return sides


def given(options: argparse.Namespace, folder: Path) -> list[object]:
    """Arguments of mldcn's side."""
    log, encoded = folder / "log.csv", folder / "mldcn"
    return ["--log", log, "--folder", encoded, "--steps", STEPS, "--threads", options.threads]


def measure(options: argparse.Namespace) -> Result:
    """Times the sides' turns."""
    with tempfile.TemporaryDirectory() as name:
        sides = start(options, Path(name))
        first = alternate(sides, 1, warm=0)
        peers = [side for side in sides if side.name.startswith("fuxictr")]
        for slower in sorted(peers, key=lambda side: first[side.name][0]["rate"])[:-1]:
            slower.close()
            sides.remove(slower)
        results = first if options.work == "profile" else alternate(sides, options.rounds, warm=0)
        last = {side.name: side.close() for side in sides}
    found: Result = {
        "work": options.work,
        "machine": machine(options.threads),
        "rows": options.rows,
        "sides": {side.name: side.about for side in sides},
    }
    if options.work == "profile":
        return found | {"shares": results["mldcn"][0]["shares"]}
    rates = {name: spread([t["rate"] for t in turns]) for name, turns in results.items()}
    found |= {
        "samples_per_second": rates,
        "ceiling_gflops": spread([t["gflops"] for t in results["ceiling"]]),
        "mldcn_to_ceiling": ratios(results, "mldcn", "ceiling", "rate"),
    }
    if peers:
        found["first_round_of_peers"] = {side.name: first[side.name][0]["rate"] for side in peers}
        best = next(name for name in rates if name.startswith("fuxictr"))
        found |= {"faster_peer": best, "mldcn_to_fuxictr": ratios(results, "mldcn", best, "rate")}
    if options.work == "train":
        found["mldcn_waiting"] = (last["mldcn"] or {})["waited"]
        dense = {side.name: side.about["dense"] for side in sides if "dense" in side.about}
        if len(set(dense.values())) > 1:
            sys.exit(f"the sides' models differ: dense parameters {dense}")
        found["dense_parameters"] = dense["mldcn"]
    return found


def show(found: Result) -> None:
    """Prints what was found."""
    print(f"{found['work']}: {found['rows']:,} rows; {found['machine']}; {found['sides']}")
    if "shares" in found:
        for kind, share in found["shares"].items():
            print(f"{kind:32} {share:6.1%}")
        return
    for name, rate in found["samples_per_second"].items():
        print(f"{name:18} {shown(rate)} samples/s")
    print(f"ceiling: {shown(found['ceiling_gflops'])} GFLOP/s")
    print(f"mldcn / ceiling: {shown(found['mldcn_to_ceiling'], 3)}")
    if "faster_peer" in found:
        print(f"mldcn / {found['faster_peer']}: {shown(found['mldcn_to_fuxictr'], 2)}")
    if "mldcn_waiting" in found:
        print(f"mldcn's loop waits for batches {found['mldcn_waiting']:.2%} of its time")
        print(f"dense parameters, the same on all sides: {found['dense_parameters']:,}")


def main() -> None:
    """Measures one kind of work."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("work", choices=["train", "predict", "profile"])
    parser.add_argument("--rows", type=int, help="of the log; what the rounds need by default")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--no-peers", action="store_true", help="without FuxiCTR")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.rows is None:
        # One epoch: it also holds the steps before the first turn and those after the last.
        steps = STEPS * (options.rounds + 3 if options.work == "train" else 4)
        options.rows = 150_000 if options.work == "predict" else steps * BATCH
    found = measure(options)
    show(found)
    report(found, options.json)


if __name__ == "__main__":
    main()
