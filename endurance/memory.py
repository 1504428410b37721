"""How much memory each command holds while the log is many times the bound: no more for a longer log.

Two ``pinads`` logs are written to disk, the first five times ``data.memory_mb`` as CSV, the second twice that;
each also packed (gzip) and as Parquet with one row group for the whole log. Encoding, an epoch of training,
evaluation and prediction run as processes of their own, whose anonymous memory (RssAnon, sampled) and whole
resident peak (VmHWM) are read from /proc. What an interpreter with all libraries holds is measured first and
taken off: the bound is on what comes on top.

    python endurance/memory.py                           # writes docs/results/memory.json
    python endurance/memory.py --distinct 50000000       # also encodes so many distinct ids in one column
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).parent))
from common import command_environment, digest_files, markdown, mldcn_command

MIB = 1 << 20
ROW_BYTES = 607  # of a pinads row as CSV
EVERY = 0.02  # seconds between two looks
# What a command imports, with a model built and one step made: memory that no log is to blame for.
IDLE = """
import torch, polars, pyarrow.parquet, pyarrow.csv, scipy.stats, safetensors.torch
from mldcn import workflow, console, predict, cli
from mldcn.training import fit
layer = torch.nn.Linear(64, 64)
layer(torch.randn(512, 64)).sum().backward()
polars.DataFrame({"a": ["b"] * 1000}).write_csv()
"""


@dataclass(frozen=True)
class Peak:
    """The most memory that a process held, in MiB, and how long it ran."""

    anonymous: float
    resident: float
    seconds: float


@dataclass(frozen=True)
class Measured:
    """One command on one log. ``above`` is anonymous memory over that of an idle interpreter, in MiB."""

    command: str
    log: str
    rows: int
    log_mib: float
    bound: int
    above: float
    resident: float
    seconds: float


def watched(arguments: Sequence[str], folder: Path) -> Peak:
    """Runs a process to its end and watches its memory.

    Raises:
        RuntimeError: it failed.
    """
    begun = time.perf_counter()
    anonymous = resident = 0
    with (folder / "messages.txt").open("w+") as messages:
        environment = {**command_environment(), "TMPDIR": str(folder)}
        process = subprocess.Popen(
            arguments, cwd=folder, stdout=subprocess.DEVNULL, stderr=messages, env=environment
        )
        while process.poll() is None:
            status = _status(process.pid)
            anonymous = max(anonymous, status.get("RssAnon", 0))
            resident = max(resident, status.get("VmHWM", 0))
            time.sleep(EVERY)
        if process.returncode:
            messages.seek(0)
            raise RuntimeError(
                f"{' '.join(arguments)}: exit code {process.returncode}: {messages.read()[-2000:]}"
            )
    return Peak(anonymous / 1024, resident / 1024, time.perf_counter() - begun)


def _status(pid: int) -> dict[str, int]:
    """Numbers of /proc/PID/status, in KiB; nothing once the process is over."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return {}
    pairs = (line.split() for line in lines)
    return {pair[0].rstrip(":"): int(pair[1]) for pair in pairs if len(pair) == 3 and pair[2] == "kB"}


def write_logs(folder: Path, rows: int) -> dict[str, Path]:
    """One log as CSV, as gzip, and as Parquet with a single row group."""
    import pyarrow.parquet as pq

    from mldcn.datasets.pinads import write_log

    write_log(folder, rows, format="csv")
    write_log(folder, rows)
    text, packed = folder / "pinads.csv", folder / "pinads.csv.gz"
    with text.open("rb") as source, gzip.open(packed, "wb", compresslevel=1) as target:
        shutil.copyfileobj(source, target, 1 << 20)
    table = pq.read_table(folder / "pinads.parquet")
    one = folder / "one-group.parquet"
    pq.write_table(table, one, row_group_size=rows)
    (folder / "pinads.parquet").unlink()
    return {"csv": text, "gzip": packed, "parquet": one}


def write_config(folder: Path, log: Path, encoded: Path, memory_mb: int, text: bool) -> Path:
    """A config that trains one small epoch on the log."""
    from mldcn.datasets.pinads import pinads_config

    raw = pinads_config(folder, format="csv" if text else "parquet")
    raw["data"] |= {"train": [str(log)], "encoded": str(encoded), "memory_mb": memory_mb}
    raw["model"] = {
        "embedding": {"dim": 4},
        "interaction": {"name": "mldcn", "num_layers": 1, "rank": 8},
        "deep": {"hidden": [8]},
    }
    raw["training"] = {
        "epochs": 1,
        "batch_size": 8192,
        "eval_batch_size": 8192,
        "threads": 1,
        "device": "cpu",
    }
    path = folder / f"{log.name}.yaml"
    path.write_text(yaml.safe_dump(raw, sort_keys=False), encoding="utf-8")
    return path


def write_apart(name: str, path: Path, count: int) -> None:
    """Calls a function of this file in a process of its own, so that this one stays small."""
    maker = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import memory; "
    maker += f"from pathlib import Path; memory.{name}(Path({str(path)!r}), {count})"
    subprocess.run([sys.executable, "-c", maker], check=True, env=command_environment())


def measure_logs(work: Path, rows: Sequence[int], memory_mb: int, idle: float) -> list[Measured]:
    """Every command on the logs of these sizes."""
    found = []
    for count in rows:
        folder = work / f"log-{count}"
        write_apart("write_logs", folder, count)
        files = {"csv": "pinads.csv", "gzip": "pinads.csv.gz", "parquet": "one-group.parquet"}
        logs = {kind: folder / name for kind, name in files.items()}
        size = logs["csv"].stat().st_size / MIB

        def note(command: str, log: str, *arguments: str, count: int = count, size: float = size) -> None:
            peak = watched([*mldcn_command(), *arguments], work)
            above = peak.anonymous - idle
            found.append(Measured(command, log, count, size, memory_mb, above, peak.resident, peak.seconds))
            print(f"{command}, {log}, {count:,} rows: {above:.0f} MiB", file=sys.stderr, flush=True)

        for kind, log in logs.items():
            encoded = folder / f"encoded-{kind}"
            config = write_config(folder, log, encoded, memory_mb, kind != "parquet")
            note("data encode", kind, "data", "encode", str(config))
            if kind != "csv":
                shutil.rmtree(encoded)
        run, config = folder / "run", folder / "pinads.csv.yaml"
        note("fit", "encoded", "fit", str(config), "--out", str(run))
        for kind in ("csv", "parquet"):
            log = str(logs[kind])
            note("evaluate", kind, "evaluate", str(run), log)
            note("predict", kind, "predict", str(run), log, "--out", str(folder / "scores.csv"))
        shutil.rmtree(folder)
    return found


def write_distinct(path: Path, ids: int) -> None:
    """A CSV in which every row has an id of its own, of 12 characters."""
    import numpy as np
    import polars as pl

    step = 1 << 20
    with path.open("wb") as file:
        for start in range(0, ids, step):
            number = np.arange(start, min(start + step, ids), dtype=np.uint64)
            mixed = (number * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(16)
            frame = pl.DataFrame({"click": (mixed % np.uint64(7) == 0).astype(np.int8), "id": mixed})
            text = pl.col("id").cast(pl.String).str.zfill(15)
            frame.with_columns(text).write_csv(file, include_header=start == 0)


def measure_distinct(work: Path, ids: int, memory_mb: int, idle: float) -> Measured:
    """Encoding a column in which no id comes twice."""
    log = work / "distinct.csv"
    write_apart("write_distinct", log, ids)
    config = {
        "data": {
            "train": [str(log)],
            "encoded": str(work / "encoded-distinct"),
            "memory_mb": memory_mb,
            "split": {"kind": "order", "valid": 0.001, "test": 0.001},
        },
        "schema": {"features": [{"name": "id", "kind": "categorical"}], "labels": [{"name": "click"}]},
    }
    path = work / "distinct.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    peak = watched([*mldcn_command(), "data", "encode", str(path)], work)
    size = log.stat().st_size / MIB
    above = peak.anonymous - idle
    shutil.rmtree(work / "encoded-distinct")
    return Measured("data encode", "distinct ids", ids, size, memory_mb, above, peak.resident, peak.seconds)


def same_result(work: Path, rows: int, bounds: Sequence[int]) -> bool:
    """Whether a log encoded under different bounds comes out byte by byte the same."""
    from mldcn.config import load_config
    from mldcn.data.prepare import prepare
    from mldcn.datasets.pinads import write_log

    folder = work / "bounds"
    write_log(folder, rows, format="csv")
    found = []
    for bound in bounds:
        encoded = folder / f"encoded-{bound}"
        config = load_config(write_config(folder, folder / "pinads.csv", encoded, bound, text=True))
        prepare(config, encoded)
        found.append(digest_files(encoded))
    shutil.rmtree(folder)
    return all(one == found[0] for one in found)


def violations(found: Sequence[Measured], slack: float = 1.15) -> list[str]:
    """Commands over the bound, or that hold more for a longer log.

    ``slack`` allows for the allocator: what was freed is not at once given back.
    """
    wrong = []
    for one in found:
        if one.command == "data encode" and one.above > one.bound:
            wrong.append(
                f"{one.command} of {one.log}, {one.rows:,} rows: {one.above:.0f} MiB, over {one.bound}"
            )
    for shorter in found:
        for longer in found:
            same = (shorter.command, shorter.log) == (longer.command, longer.log)
            if same and shorter.rows < longer.rows and longer.above > slack * shorter.above + 16:
                wrong.append(
                    f"{longer.command} of {longer.log}: {shorter.above:.0f} MiB for {shorter.rows:,} rows, "
                    f"{longer.above:.0f} for {longer.rows:,}"
                )
    return wrong


def show(found: Sequence[Measured]) -> str:
    """A Markdown table."""
    return markdown(
        ["command", "log", "rows", "as CSV, MiB", "bound, MiB", "peak above idle, MiB", "VmHWM, MiB", "s"],
        [
            [
                one.command,
                one.log,
                f"{one.rows:,}",
                f"{one.log_mib:,.0f}",
                one.bound,
                f"{one.above:,.0f}",
                f"{one.resident:,.0f}",
                f"{one.seconds:.0f}",
            ]
            for one in found
        ],
    )


def main() -> int:
    """Prints the table and writes the numbers; the exit code is 1 where a bound was broken."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--memory-mb", type=int, default=256, help="the bound")
    parser.add_argument("--factor", type=float, default=5.0, help="bytes of the shorter log, over the bound")
    parser.add_argument("--distinct", type=int, default=0, help="also encode so many distinct ids")
    parser.add_argument("--distinct-mb", type=int, default=1024, help="under this bound")
    parser.add_argument("--work", type=Path, help="where the logs go; a temporary folder by default")
    parser.add_argument("--out", type=Path, default=Path("docs/results/memory.json"))
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory(prefix="mldcn-memory-", dir=options.work) as folder:
        work = Path(folder).resolve()
        idle = watched([sys.executable, "-c", IDLE], work)
        rows = int(options.factor * options.memory_mb * MIB / ROW_BYTES)
        found = measure_logs(work, (rows, 2 * rows), options.memory_mb, idle.anonymous)
        same = same_result(work, 50_000, (256, 4096))
        if options.distinct:
            found.append(measure_distinct(work, options.distinct, options.distinct_mb, idle.anonymous))
    wrong = violations(found) + ([] if same else ["the bound changed what was encoded"])
    told: dict[str, Any] = {"idle_mib": idle.anonymous, "measured": [asdict(one) for one in found]}
    options.out.write_text(json.dumps(told | {"violations": wrong}, indent=1) + "\n", encoding="utf-8")
    print(show(found))
    print(f"\nidle interpreter: {idle.anonymous:.0f} MiB anonymous; wrote {options.out}")
    for line in wrong:
        print(line)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
