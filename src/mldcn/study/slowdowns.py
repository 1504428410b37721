"""How much longer a study's models take to score a batch than the baseline: timed in turns, with intervals."""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mldcn.config import Config, load_config
from mldcn.cost import sample_batch
from mldcn.data.batch import EncodedLayout
from mldcn.data.prepare import prepare
from mldcn.files import write_text
from mldcn.model import Ranker, pick_device
from mldcn.run import RunFolder
from mldcn.study.rows import RunRow, Study

FILE = "slowdowns.json"
ROUNDS = 40
ROUND_SECONDS = 0.01  # that each model is timed in a round, one call at least
DRAWS = 2_000


@dataclass(frozen=True)
class Slowdown:
    """Time of a model over that of the baseline, scoring the same batch.

    rival, point: the model. hashes: of both configs, baseline first. batch: its rows. ratio: the median over
    rounds. low, high: its 95 % bootstrap interval over rounds. milliseconds: medians, the baseline's first.
    """

    rival: str
    point: str
    hashes: tuple[str, str]
    batch: int
    ratio: float
    low: float
    high: float
    milliseconds: tuple[float, float]
    rounds: int
    device: str
    threads: int


def measure_slowdowns(study: Study, told: Callable[[str], None] = lambda _: None) -> list[Slowdown]:
    """Times each model of a study against the baseline; those that are known already are not timed again.

    Args:
        study: whose recipe has limits; models whose run folders are gone are passed over.
        told: what is being measured.
    """
    base, first = _first(study.baseline()), _firsts(study)
    known = {(s.rival, s.point): s for s in read_slowdowns(study)}
    todo = [row for row in first if (row.rival, row.point) not in known and _config(study, row) is not None]
    config = _config(study, base) if base is not None else None
    if base is None or config is None or not todo:
        return list(known.values())
    batch = study.recipe.limits.latency_batch or max(study.recipe.latency_batches)
    device, threads = str(pick_device(config.training.device)), config.training.threads or 1
    layout = prepare(config, Path(str(config.data.encoded)), None).encoder.layout
    kept = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        baseline = _scorer(config, layout, batch, device)
        for row in todo:
            told(f"{row.rival} at {row.point} against the baseline")
            rival = _config(study, row)
            assert rival is not None
            times = time_in_turns(baseline, _scorer(rival, layout, batch, device))
            ratio, low, high = ratio_of(*times)
            milliseconds = tuple(1e3 * statistics.median(each) for each in times)
            known[row.rival, row.point] = Slowdown(
                rival=row.rival,
                point=row.point,
                hashes=(base.config_hash, row.config_hash),
                batch=batch,
                ratio=ratio,
                low=low,
                high=high,
                milliseconds=(milliseconds[0], milliseconds[1]),
                rounds=len(times[0]),
                device=device,
                threads=threads,
            )
            found = [asdict(each) for each in known.values()]
            write_text(study.out / FILE, json.dumps(found, indent=1) + "\n")
    finally:
        torch.set_num_threads(kept)
    return list(known.values())


def read_slowdowns(study: Study) -> list[Slowdown]:
    """What was measured of the study's models as they are now."""
    file, base = study.out / FILE, _first(study.baseline())
    if not file.exists() or base is None:
        return []
    batch = study.recipe.limits.latency_batch or max(study.recipe.latency_batches)
    hashes = {(row.rival, row.point): (base.config_hash, row.config_hash) for row in _firsts(study)}
    found = [
        Slowdown(**{**each, "hashes": tuple(each["hashes"]), "milliseconds": tuple(each["milliseconds"])})
        for each in json.loads(file.read_text(encoding="utf-8"))
    ]
    return [s for s in found if s.batch == batch and hashes.get((s.rival, s.point)) == s.hashes]


def time_in_turns(
    a: Callable[[], object], b: Callable[[], object], *, rounds: int = ROUNDS, seconds: float = ROUND_SECONDS
) -> tuple[list[float], list[float]]:
    """Median seconds of a call of each, round by round.

    Both are timed in every round, now the one first and now the other, so that a machine that slows down or
    speeds up does so for both.

    Args:
        a: the one.
        b: the other.
        rounds: how often.
        seconds: for each in a round; a call at least.
    """
    for warm_up in (a, b, a, b):
        warm_up()
    found: tuple[list[float], list[float]] = ([], [])
    for i in range(rounds):
        for which in (0, 1) if i % 2 == 0 else (1, 0):
            found[which].append(statistics.median(_timed((a, b)[which], seconds)))
    return found


def _timed(call: Callable[[], object], seconds: float) -> Iterable[float]:
    end = time.perf_counter() + seconds
    start = 0.0
    while start < end:
        start = time.perf_counter()
        call()
        now = time.perf_counter()
        yield now - start
        start = now


def ratio_of(a: Sequence[float], b: Sequence[float], *, seed: int = 0) -> tuple[float, float, float]:
    """Median over rounds of B's time over A's, and its 95 % interval: rounds are drawn again.

    Args:
        a: seconds, by round.
        b: those of the other in the same rounds.
        seed: of the draws.

    Example:
        >>> ratio, low, high = ratio_of([1.0, 2.0, 4.0], [2.0, 4.0, 8.0])
        >>> f"{low:.3f} {ratio:.3f} {high:.3f}"
        '2.000 2.000 2.000'
    """
    logs = np.log(np.asarray(b, np.float64)) - np.log(np.asarray(a, np.float64))
    drawn = np.random.default_rng(seed).integers(len(logs), size=(DRAWS, len(logs)))
    low, high = np.quantile(np.median(logs[drawn], axis=1), (0.025, 0.975))
    return math.exp(float(np.median(logs))), math.exp(float(low)), math.exp(float(high))


def _scorer(config: Config, layout: EncodedLayout, rows: int, device: str) -> Callable[[], Any]:
    model = Ranker(config.model, config.log_schema, layout).to(device).eval()
    batch = sample_batch(layout, rows).to(device)

    def score() -> None:
        model.relevance(batch.ids, batch.dense)
        if device.startswith("cuda"):
            torch.cuda.synchronize()

    return score


def _config(study: Study, row: RunRow) -> Config | None:
    file = RunFolder(study.out / row.run).config
    return load_config(file) if file.exists() else None


def _firsts(study: Study) -> list[RunRow]:
    """A row of each model that has a row in the table, that of the first seed that is finished."""
    hard = study.recipe.limits.stress
    cells = dict.fromkeys((row.rival, row.point) for row in study.final if row.point not in hard)
    return [row for cell in cells if (row := _first(study.at(*cell))) is not None]


def _first(rows: Sequence[RunRow]) -> RunRow | None:
    return rows[0] if rows else None
