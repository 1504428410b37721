"""Kills ``mldcn`` with SIGKILL at random moments and starts it again, until it is done.

A *life* is one folder in which a log is encoded, a model trained, evaluated and used, in this order. Every command
is killed a few times on its way, with all its processes, at seeded moments from its start to behind its usual
end; then it is left alone. In the end everything must be as if nothing had happened: weights, metrics, encoded
rows, scores and printed tables bitwise those of an uninterrupted life, no file more or less, the log untouched.

    python endurance/kill.py                # 200 kills
    python endurance/kill.py --kills 20 --seed 7
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from common import digest_files, markdown, write_small_log
from lives import Life, born, execute, live, names

MOST_KILLS = 6  # of one command in one life
OFTEN = {"encode": 3.0, "fit": 5.0, "evaluate": 1.5, "predict": 1.5}  # shares of the kills


def differences(life: Life, whole: Life) -> list[str]:
    """In what a life differs from an uninterrupted one."""
    found = list(life.violations)
    for command, expected in whole.outcomes.items():
        outcome = life.outcomes.get(command, {})
        changed = [name for name in {**expected, **outcome} if outcome.get(name) != expected.get(name)]
        if changed and not found:
            found.append(f"{life.folder.name}: after {command} these differ: {', '.join(sorted(changed))}")
    if not found:
        there, expected_there = names(life.folder), names(whole.folder)
        if there != expected_there:
            more, less = sorted(there - expected_there), sorted(expected_there - there)
            found.append(f"{life.folder.name}: left behind: {more}; missing: {less}")
    return found


def draw(rng: np.random.Generator, whole: Life, count: int) -> dict[str, list[float]]:
    """Moments for some kills of one life: over a command's whole time, and more of them around its end."""
    moments: dict[str, list[float]] = {}
    share = np.array([OFTEN[name] for name in whole.seconds])
    for name in rng.choice(np.array(list(whole.seconds)), count, p=share / share.sum()):
        usual = whole.seconds[name]
        low, high = (0.0, usual) if rng.random() < 0.75 else (0.85 * usual, 1.1 * usual)
        moments.setdefault(str(name), []).append(float(rng.uniform(low, high)))
    return {name: times[:MOST_KILLS] for name, times in moments.items()}


def check(
    work: Path, *, kills: int, rows: int, seed: int = 0, jobs: int = 1
) -> tuple[Counter[str], list[str], int]:
    """Kills until so many kills have hit.

    Args:
        work: an empty folder.
        kills: how many.
        rows: of the log.
        seed: of the moments.
        jobs: lives at the same time.

    Returns:
        The kills of each command, the violations, and the number of lives.
    """
    work = work.resolve()
    config = write_small_log(work / "log", rows, "csv", batch_size=256)
    log = config.parent / "pinads.csv"
    untouched = digest_files(log.parent)
    # The process that all others are forked from takes seconds to start, which are no command's.
    execute(born(work / "whole", log).folder, ["--version"], None)
    whole = live(work / "whole", log, {})
    if whole.violations:
        return Counter(), whole.violations, 0
    rng = np.random.default_rng(seed)
    hit: Counter[str] = Counter()
    violations: list[str] = []
    lives = 0
    with ThreadPoolExecutor(jobs) as pool:
        while hit.total() < kills and len(violations) < 10:
            wave = [
                (work / f"life-{lives + i:03d}", draw(rng, whole, int(rng.integers(4, 10))))
                for i in range(jobs)
            ]
            lives += jobs
            for life in pool.map(lambda drawn: live(drawn[0], log, drawn[1]), wave):
                hit += life.kills
                print(f"{life.folder.name}: {life.kills.total()} kills", file=sys.stderr)
                found = differences(life, whole)
                violations += found
                if not found:
                    shutil.rmtree(life.folder)
    if digest_files(log.parent) != untouched:
        violations.append("the log's folder was changed")
    return hit, violations, lives


def main() -> int:
    """Prints how often each command was killed; the exit code is 1 where anything was lost."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--rows", type=int, default=12_000, help="impressions in the log")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2, help="lives at the same time")
    parser.add_argument(
        "--work", type=Path, help="an empty folder, kept afterwards; a temporary one by default"
    )
    options = parser.parse_args()
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="mldcn-kill-") as folder:
        hit, violations, lives = check(
            options.work or Path(folder),
            kills=options.kills,
            rows=options.rows,
            seed=options.seed,
            jobs=options.jobs,
        )
    print(markdown(["command", "kills"], [*sorted(hit.items()), ("all", hit.total())]))
    for violation in violations:
        print(f"\n{violation}")
    print(f"\n{lives} lives, {len(violations)} violations, {time.perf_counter() - begun:.0f} s")
    return 1 if violations else 0


if __name__ == "__main__":
    sys.exit(main())
