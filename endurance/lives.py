"""Lives: folders in which a log is encoded, a model trained, evaluated and used, one command after the other."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from common import command_environment, digest_bytes, digest_files, digest_results

KILLED = -signal.SIGKILL
LIMIT = 600.0  # seconds after which a command counts as hung


@dataclass(frozen=True)
class Command:
    """A step of a life. ``again`` goes on where ``first`` was cut off, if that is another command."""

    name: str
    first: list[str]
    again: list[str]
    outcome: Callable[[Path, str], dict[str, str]]


def encoded_files(life: Path, _: str) -> dict[str, str]:
    """All that encoding leaves."""
    return digest_files(life / "encoded")


def run_files(life: Path, _: str) -> dict[str, str]:
    """What training leaves, apart from its timings."""
    return digest_results(life / "run")


def printed(life: Path, out: str) -> dict[str, str]:
    """The metrics that ``evaluate`` prints."""
    return {"stdout": digest_bytes([out.encode()])}


def scores(life: Path, _: str) -> dict[str, str]:
    """The scores that ``predict`` writes."""
    return {"scores.csv": digest_bytes([(life / "scores.csv").read_bytes()])}


def commands(log: Path) -> list[Command]:
    """The commands of a life, which is their working folder."""
    encode = ["data", "encode", "config.yaml"]
    fit = ["fit", "config.yaml", "--out", "run"]
    evaluate = ["evaluate", "run", str(log)]
    predict = ["predict", "run", str(log), "--out", "scores.csv", "--keep", "request_id"]
    return [
        Command("encode", encode, encode, encoded_files),
        Command("fit", fit, ["fit", "--resume", "run"], run_files),
        Command("evaluate", evaluate, evaluate, printed),
        Command("predict", predict, predict, scores),
    ]


@dataclass
class Life:
    """What happened to one folder."""

    folder: Path
    kills: Counter[str] = field(default_factory=Counter)
    outcomes: dict[str, dict[str, str]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    violations: list[str] = field(default_factory=list)


def _command(arguments: list[str], folder: Path, out: Path, err: Path) -> None:
    """In a process of its own: what the shell would do."""
    os.setsid()
    os.chdir(folder)
    for path, number in ((out, 1), (err, 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.environ.update(command_environment(), TMPDIR=str(folder / "tmp"))
    tempfile.tempdir = None
    sys.argv = ["mldcn", *arguments]
    from mldcn.cli import main

    main()


def execute(life: Path, arguments: list[str], kill_after: float | None) -> tuple[int, str, str]:
    """Runs a command in a process of its own; after so many seconds it is killed with all its children.

    The process is forked from one that has imported all libraries but has not used them: the seconds in which an
    interpreter starts, and nothing can happen to a file, are spared.

    Returns:
        The exit code, what was printed, and the messages.
    """
    os.environ |= command_environment()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["mldcn.workflow", "mldcn.training.fit", "polars", "pyarrow.parquet"])
    with tempfile.TemporaryDirectory(prefix="printed-") as folder:
        out, err = Path(folder) / "out", Path(folder) / "err"
        process = context.Process(target=_command, args=(arguments, life, out, err))
        process.start()
        process.join(LIMIT if kill_after is None else kill_after)
        late = process.is_alive()
        if late and process.pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)
                os.killpg(process.pid, signal.SIGKILL)
        process.join()
        texts = [path.read_text(encoding="utf-8") if path.exists() else "" for path in (out, err)]
    code = process.exitcode if process.exitcode is not None else 1
    return (124 if late and kill_after is None else code), *texts  # type: ignore[return-value]


def until_done(life: Life, command: Command, moments: list[float], *, cut_off: bool = False) -> None:
    """Runs a command, kills it after each of these many seconds, then lets it end.

    Args:
        life: its outcome, kills and violations are noted here.
        command: what to run.
        moments: seconds from the start of the command, or of its next start.
        cut_off: it was begun before.
    """
    arguments, waiting = command.again if cut_off else command.first, list(moments)
    asked_for_the_other = not cut_off
    while True:
        moment = waiting.pop(0) if waiting else None
        begun = time.perf_counter()
        code, out, err = execute(life.folder, arguments, moment)
        if code == KILLED:
            life.kills[command.name] += 1
            arguments, asked_for_the_other = command.again, False
        elif code == 0:
            if moment is None:
                life.seconds[command.name] = time.perf_counter() - begun
            life.outcomes[command.name] = command.outcome(life.folder, out)
            return
        elif code == 1 and command.first != command.again and not asked_for_the_other and clear(err):
            # Killed before there was anything to go on with, the message says to begin anew; or killed again
            # behind that point, it says to go on.
            arguments = command.first if arguments == command.again else command.again
            asked_for_the_other = True
            waiting = [*([] if moment is None else [moment]), *waiting]
        else:
            shown = " ".join(arguments)
            life.violations.append(
                f"{life.folder.name}: '{shown}' ended with {code} after {life.kills}: {err[-2000:]}"
            )
            return


def clear(err: str) -> bool:
    """Whether a message is one for users, and blames no process, which is dead."""
    return not any(wrong in err for wrong in ("Traceback", "internal error", "process"))


def born(folder: Path, log: Path) -> Life:
    """A life that has not begun: a config, and a folder for temporary files."""
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "tmp").mkdir(parents=True)
    config = (log.parent / "config.yaml").read_text(encoding="utf-8")
    config = re.sub(r"encoded: .*", "encoded: encoded", config)
    (folder / "config.yaml").write_text(config, encoding="utf-8")
    return Life(folder)


def live(folder: Path, log: Path, moments: dict[str, list[float]]) -> Life:
    """One life, from an empty folder to the last command."""
    life = born(folder, log)
    for command in commands(log):
        until_done(life, command, moments.get(command.name, []))
        if life.violations:
            break
    return life


def names(folder: Path) -> set[str]:
    """Every file and folder of a life."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}
