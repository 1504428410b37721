"""Look-ups in served tables: how fast in memory, and how they fare when a table is larger than memory.

    python benchmarks/serving_tables.py --folder /var/tmp/tables --json docs/results/serving_tables.json

Four parts, each row of which is a batch of ``BATCH`` rows with ``COLUMNS`` ids each, drawn by Zipf's law (exponent
1) over all rows of one table, popular rows scattered over the file:

- ``rates``: mapped tables of each kind against ``torch.nn.functional.embedding`` in a tensor of float32, and
  against FBGEMM's quantised tables where ``fbgemm_gpu`` can be imported. Sides take turns; a ratio is that of one
  round's times.
- ``larger``: one table of each kind in processes of a control group with ``--limit-mb`` of memory, page cache
  included (needs root on Linux). A look-up that waits for the disk is a major fault; the hit rate is the share of
  look-ups without one. The file is read once before, as loading a bundle does for its checksum.
- ``overlap``: on the largest of these, batches whose look-ups run beside the computation of the batch before,
  against the same one after the other.
- ``remote``: a table in a Redis server of its own (where ``redis-server`` is there), by size of the cache.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import shutil
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from turns import Result, machine, report, shown, spread

from mldcn.serving.program import LookUp
from mldcn.serving.remote import RemoteTable, remote_rows, remove_tables, upload_tables
from mldcn.serving.store import KINDS, Kind, TableFile, packed, row_bytes, write_table

BATCH, COLUMNS = 512, 26
WIDTH = 64
SCATTER = 2_654_435_761  # odd, so that it maps numbers below a power of two one to one


class Ids:
    """Batches of row numbers by Zipf's law with exponent 1; ``rows`` is a power of two."""

    def __init__(self, rows: int, seed: int = 0, *, scattered: bool = True) -> None:
        assert rows & (rows - 1) == 0
        self._rng = np.random.default_rng(seed)
        self._rows = rows
        self._scattered = scattered

    def __call__(self) -> torch.Tensor:
        """``(BATCH, COLUMNS)``."""
        ranks = np.exp(self._rng.random((BATCH, COLUMNS)) * np.log(self._rows)).astype(np.uint64) - np.uint64(
            1
        )
        if self._scattered:
            ranks = ranks * np.uint64(SCATTER) & np.uint64(self._rows - 1)
        return torch.from_numpy(ranks.astype(np.int64))


def seconds(work: Callable[[], object]) -> float:
    """Of one call."""
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def fbgemm_sides(rows: int) -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
    """FBGEMM's quantised tables, looked up one row a bag; none where it is not there."""
    try:
        from fbgemm_gpu.split_embedding_configs import SparseType
        from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation, PoolingMode
        from fbgemm_gpu.split_table_batched_embeddings_ops_inference import (
            IntNBitTableBatchedEmbeddingBagsCodegen,
        )
    except ImportError:
        return {}
    sides = {}
    for name, kind in (("int8", SparseType.INT8), ("int4", SparseType.INT4)):
        table = IntNBitTableBatchedEmbeddingBagsCodegen(
            [("", rows, WIDTH, kind, EmbeddingLocation.HOST)],
            device="cpu",
            pooling_mode=PoolingMode.NONE,
            output_dtype=SparseType.FP32,
        )
        table.initialize_weights()
        offsets = torch.arange(BATCH * COLUMNS + 1, dtype=torch.int32)
        sides[f"fbgemm {name}"] = lambda ids, table=table, offsets=offsets: table(
            ids.flatten().int(), offsets
        )
    return sides


def rates(folder: Path, rows: int, rounds: int) -> Result:
    """Part ``rates``."""
    torch.manual_seed(0)
    weight = torch.randn(rows, WIDTH)
    sides: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "torch": lambda ids: torch.nn.functional.embedding(ids, weight)
    }
    for kind in KINDS:
        write_table(weight, folder / f"{kind}.bin", kind)
        table = TableFile(folder / f"{kind}.bin", kind, rows, WIDTH)
        sides[kind] = table.look_up
    sides |= fbgemm_sides(rows)
    ids = Ids(rows)
    taken: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(-5, rounds):
        batches = [ids() for _ in range(5)]
        names = list(sides)
        at = turn % len(names)
        for name in (*names[at:], *names[:at]):
            look_up = sides[name]
            with torch.inference_mode():
                took = min(seconds(lambda batch=batch, side=look_up: side(batch)) for batch in batches)
            if turn >= 0:
                taken[name].append(took)
    for kind in KINDS:
        (folder / f"{kind}.bin").unlink()
    found: Result = {"rows": rows, "width": WIDTH, "look_ups": BATCH * COLUMNS, "sides": {}}
    for name, times in taken.items():
        found["sides"][name] = {
            "look_ups_per_second": BATCH * COLUMNS / statistics.median(times),
            "over_torch": spread([a / b for a, b in zip(taken["torch"], times, strict=True)]),
        }
        print(f"{name}: {found['sides'][name]['look_ups_per_second'] / 1e6:.1f} million a second, "
              f"{shown(found['sides'][name]['over_torch'], 2)} times torch's rate")  # fmt: skip
    return found


@contextlib.contextmanager
def control_group(limit: int) -> Iterator[Path]:
    """A control group (version 1 or 2) whose processes and their page cache have so many bytes."""
    root = Path("/sys/fs/cgroup")
    first = (root / "memory").is_dir()
    group = (root / "memory" if first else root) / f"mldcn-benchmark-{os.getpid()}"
    group.mkdir()
    try:
        (group / ("memory.limit_in_bytes" if first else "memory.max")).write_text(str(limit))
        yield group
    finally:
        with contextlib.suppress(OSError):
            group.rmdir()


def write_large(path: Path, kind: Kind, rows: int) -> None:
    """A table of so many rows, the same 65,536 again and again, and none of it in the page cache."""
    torch.manual_seed(0)
    chunk = packed(torch.randn(1 << 16, WIDTH), kind).numpy().tobytes()
    with path.open("wb") as file:
        for _ in range(rows >> 16):
            file.write(chunk)
        file.flush()
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def larger_turn(
    folder: Path, kind: Kind, rows: int, group: Path, taking: float, *, scattered: bool
) -> Result:
    """One table in a process of the group."""
    path = folder / "large.bin"
    if not path.exists() or path.stat().st_size != rows * row_bytes(kind, WIDTH):
        write_large(path, kind, rows)
    else:
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    command = [sys.executable, __file__, "--child", path, kind, rows, taking, int(scattered)]
    done = subprocess.run(
        list(map(str, command)),
        capture_output=True,
        text=True,
        check=True,
        # The whole process lives in the group, from its first page on.
        preexec_fn=lambda: (group / "cgroup.procs").write_text(str(os.getpid())),
    )
    result: Result = json.loads(done.stdout)
    return result


def child(path: Path, kind: Kind, rows: int, taking: float, scattered: bool) -> None:
    """In the control group: the file is read once, as loading does for its checksum, then looked up in."""
    torch.set_num_threads(1)
    with path.open("rb") as file:
        while file.read(1 << 22):
            pass
    table = TableFile(path, kind, rows, WIDTH)
    ids = Ids(rows, scattered=scattered)

    def measured(limit: float) -> tuple[list[float], float]:
        times: list[float] = []
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_majflt
        end = time.perf_counter() + limit
        while time.perf_counter() < end:
            batch = ids()
            times.append(seconds(lambda batch=batch: table.look_up(batch)))
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_majflt - faults
        return times, 1 - faults / (len(times) * BATCH * COLUMNS)

    measured(2 * taking)
    times, hits = measured(taking)
    found: Result = {
        "hit_rate": hits,
        "median_ms": 1000 * statistics.median(times),
        "p99_ms": 1000 * float(np.percentile(times, 99)),
        "batches": len(times),
        "look_ups_per_second": len(times) * BATCH * COLUMNS / sum(times),
    }
    if kind == "fp32" and scattered:
        found["overlap"] = overlapped(table, ids)
    print(json.dumps(found))


def overlapped(table: TableFile, ids: Ids, rounds: int = 5, batches: int = 8) -> Result:
    """Part ``overlap``: a computation about as long as the look-ups, after them or beside the next ones'."""
    net = torch.nn.Sequential(
        torch.nn.Linear(COLUMNS * WIDTH, 1024), torch.nn.ReLU(), torch.nn.Linear(1024, 256)
    )
    gains, parts = [], []
    with torch.inference_mode(), ThreadPoolExecutor(1) as pool:

        def look_up(batch: torch.Tensor) -> torch.Tensor:
            with torch.inference_mode():
                return table.look_up(batch)

        def straight(given: list[torch.Tensor]) -> float:
            looking = 0.0
            for batch in given:
                begun = time.perf_counter()
                rows = look_up(batch)
                looking += time.perf_counter() - begun
                net(rows.flatten(1))
            return looking

        def beside(given: list[torch.Tensor]) -> None:
            coming = pool.submit(look_up, given[0])
            for batch in [*given[1:], None]:
                rows = coming.result()
                if batch is not None:
                    coming = pool.submit(look_up, batch)
                net(rows.flatten(1))

        for turn in range(-1, rounds):
            # Other batches for each, by the same law: those of one would find the other's in memory.
            given = [[ids() for _ in range(batches)] for _ in range(2)]
            begun = time.perf_counter()
            looking = straight(given[0])
            one = time.perf_counter() - begun
            other = seconds(lambda given=given: beside(given[1]))
            if turn >= 0:
                gains.append(one / other)
                parts.append(looking / one)
    return {"gain": spread(gains), "share_of_look_ups": spread(parts)}


def larger(folder: Path, exponents: list[int], limit: int, taking: float) -> Result:
    """Part ``larger``."""
    found: Result = {"limit_bytes": limit, "width": WIDTH, "turns": []}
    with control_group(limit) as group:
        for exponent in exponents:
            for kind in reversed(KINDS):
                for scattered in (True, False) if kind == "fp32" and exponent == exponents[-1] else (True,):
                    rows = 1 << exponent
                    turn = larger_turn(folder, kind, rows, group, taking, scattered=scattered)
                    size = rows * row_bytes(kind, WIDTH)
                    about = {"kind": kind, "rows": rows, "bytes": size, "scattered": scattered}
                    found["turns"].append(about | turn)
                    where = "" if scattered else ", popular rows together"
                    print(
                        f"{kind}, {rows:,} rows, {size >> 20:,} MiB of {limit >> 20:,}{where}: hit rate "
                        f"{turn['hit_rate']:.4f}, median {turn['median_ms']:.2f} ms, p99 {turn['p99_ms']:.2f} "
                        f"ms, {turn['look_ups_per_second'] / 1e6:.2f} million look-ups a second"
                    )
                    if "overlap" in turn:
                        print(f"  overlap: {shown(turn['overlap']['gain'], 2)} times as many batches")
    (folder / "large.bin").unlink()
    return found


def remote(folder: Path, rows: int, rounds: int) -> Result | None:
    """Part ``remote``: int8 rows in a Redis server on this machine."""
    if shutil.which("redis-server") is None:
        print("remote: not measured, there is no redis-server")
        return None
    torch.manual_seed(0)
    plan = LookUp("table", "remote.bin", "int8", rows, WIDTH, [0], [0], [], [], {})
    write_table(torch.randn(rows, WIDTH), folder / plan.file, plan.kind)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen(
        ["redis-server", "--port", str(port), "--save", "", "--dir", str(folder)], stdout=subprocess.DEVNULL
    )
    url = f"redis://127.0.0.1:{port}/?socket_timeout=10"
    try:
        for _ in range(100):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 0.1):
                break
            time.sleep(0.05)
        upload = seconds(lambda: upload_tables(folder, "v", [plan], url, lambda *_: None))
        found: Result = {"rows": rows, "upload_bytes_per_second": rows * row_bytes("int8", WIDTH) / upload}
        found["turns"] = []
        store = remote_rows(url, "v", [plan])
        for share in (0.0, 0.01, 0.1, 1.0):
            whole = 1.25 * rows * (row_bytes("int8", WIDTH) + 16)
            table, ids = RemoteTable(store, plan, int(share * whole)), Ids(rows)
            for _ in range(rounds):
                table.look_up(ids())
            hits, misses = table.cache.hits, table.cache.misses
            times = [seconds(lambda table=table, ids=ids: table.look_up(ids())) for _ in range(rounds)]
            hits, misses = table.cache.hits - hits, table.cache.misses - misses
            turn = {
                "cache_share": share,
                "hit_rate_of_different_rows": hits / (hits + misses),
                "rows_fetched_a_batch": misses / rounds,
                "median_ms": 1000 * statistics.median(times),
                "p99_ms": 1000 * float(np.percentile(times, 99)),
            }
            found["turns"].append(turn)
            print(f"remote, cache of {share:.0%} of the rows: {turn['rows_fetched_a_batch']:,.0f} rows fetched "
                  f"a batch, median {turn['median_ms']:.1f} ms, p99 {turn['p99_ms']:.1f} ms")  # fmt: skip
        remove_tables("v", [plan], url)
        return found
    finally:
        server.kill()
        server.wait()
        (folder / plan.file).unlink()


def main() -> None:
    """Reads the command line."""
    if sys.argv[1:2] == ["--child"]:
        path, kind, rows, taking, scattered = sys.argv[2:]
        child(Path(path), kind, int(rows), float(taking), scattered == "1")  # type: ignore[arg-type]
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--folder", type=Path, required=True, help="on a disk with room for the largest table"
    )
    parser.add_argument("--json", type=Path, help="other parts' results in it are kept")
    parser.add_argument("--parts", nargs="+", default=["rates", "remote", "larger"])
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--limit-mb", type=int, default=1024, help="of the control group")
    parser.add_argument(
        "--rows", type=int, nargs="+", default=[21, 24], help="powers of two, of part 'larger'"
    )
    parser.add_argument(
        "--seconds", type=float, default=8.0, help="of measuring, by table, after twice as many"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    folder: Path = options.folder
    folder.mkdir(parents=True, exist_ok=False)
    try:
        result: Result = (
            json.loads(options.json.read_text()) if options.json and options.json.exists() else {}
        )
        result |= {"machine": machine(1), "zipf_exponent": 1.0}
        if "rates" in options.parts:
            result["rates"] = rates(folder, 1 << 20, options.rounds)
        if "remote" in options.parts:
            result["remote"] = remote(folder, 1 << 20, options.rounds)
        if "larger" in options.parts:
            try:
                result["larger"] = larger(folder, options.rows, options.limit_mb << 20, options.seconds)
            except OSError as error:
                print(f"larger: not measured ({error}); it needs root and control groups")
        report(result, options.json)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
