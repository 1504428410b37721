"""Benchmarks whose sides run in processes of their own and take turns, so that noise falls on all alike.

A side's script calls :func:`serve` (or holds an :class:`Answers`); the benchmark starts :class:`Side` objects
and calls :func:`alternate`. Only the standard library is used: a side may live in another virtual environment.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
PEER_PYTHON = HERE.parent / ".venv-peers" / "bin" / "python"

Result = dict[str, Any]


class Answers:
    """A side's end of the line. It says what it is first; libraries' prints go to stderr from then on."""

    def __init__(self, about: Result) -> None:
        self._file = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        self.send(about)

    def send(self, result: Result) -> None:
        """Answers a turn."""
        self._file.write(json.dumps(result) + "\n")
        self._file.flush()

    def asked(self) -> bool:
        """Waits for the next turn; False when there will be none."""
        return bool(sys.stdin.readline())


def serve(about: Result, work: Callable[[], Result]) -> None:
    """In a side's process: says what it is, then does the work once for each turn."""
    answers = Answers(about)
    while answers.asked():
        answers.send(work())


class Side:
    """A side in a process of its own.

    Args:
        name: what results call it.
        command: a Python file beside this one, and its arguments.
        threads: how many its libraries may use.
        python: the interpreter; this one by default.
        log: where its stderr goes.
    """

    def __init__(
        self, name: str, command: Sequence[object], threads: int, log: Path, python: Path | None = None
    ) -> None:
        self.name = name
        self.log = log
        variables = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "POLARS_MAX_THREADS")
        script, *arguments = map(str, command)
        with log.open("w") as errors:
            self._process = subprocess.Popen(
                [str(python or sys.executable), str(HERE / script), *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=os.environ | dict.fromkeys(variables, str(threads)) | {"RAY_USAGE_STATS_ENABLED": "0"},
            )
        self.about = self._answer()

    def turn(self) -> Result:
        """Has it do its work once."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return self._answer()

    def close(self) -> Result | None:
        """Lets the process end; gives what it has to say in the end, if anything."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        last = self._process.stdout.readline()
        self._process.wait()
        return json.loads(last) if last else None

    def _answer(self) -> Result:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            sys.exit(f"{self.name} ended; the end of {self.log}:\n{self.log.read_text()[-2000:]}")
        answer: Result = json.loads(line)
        return answer


def alternate(sides: Sequence[Side], rounds: int, warm: int = 1) -> dict[str, list[Result]]:
    """Results of each side's turns, by name; the first ``warm`` rounds warm up and are left out."""
    results: dict[str, list[Result]] = {side.name: [] for side in sides}
    for i in range(warm + rounds):
        # Whose turn is first changes: nobody always follows the same neighbour.
        at = i % len(sides)
        for side in (*sides[at:], *sides[:at]):
            result = side.turn()
            if i >= warm:
                results[side.name].append(result)
    return results


def spread(values: Sequence[float]) -> Result:
    """Median, lowest and highest."""
    return {"median": statistics.median(values), "low": min(values), "high": max(values), "n": len(values)}


def ratios(results: dict[str, list[Result]], above: str, below: str, key: str) -> Result:
    """The spread of one side's value over another's, round by round."""
    pairs = zip(results[above], results[below], strict=True)
    return spread([a[key] / b[key] for a, b in pairs])


def shown(values: Result, digits: int = 0) -> str:
    """A spread in words."""
    return f"{values['median']:,.{digits}f} ({values['low']:,.{digits}f} to {values['high']:,.{digits}f})"


def machine(threads: int) -> Result:
    """What the figures were taken on."""
    model = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        model = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return {"processor": model, "cores": os.cpu_count(), "threads": threads, "load": os.getloadavg()[0]}


def report(result: Result, path: Path | None) -> None:
    """Writes a benchmark's results as JSON, where asked for."""
    if path is not None:
        path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
