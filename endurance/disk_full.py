"""Lets the disk fill up under every command, at many points, and then makes room and runs the command again.

The commands of a life (see ``lives.py``) and a small study work on a tmpfs on which only so many bytes are left,
from none to as many as the command takes. Each must end in one line that names a file and says what to do, with
exit code 1; nothing half-written may pass for whole; and with room again the same command must come to the
same result as if nothing had happened, leaving no file more or less.

    python endurance/disk_full.py               # as root, since it mounts a tmpfs
    python endurance/disk_full.py --points 5 --only fit
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from common import digest_files, digest_study, markdown, write_small_log, write_small_study
from lives import Command, Life, born, commands, execute, names, until_done

SIZE = 64 << 20  # of the disk
PAGE = 4096
REMEDY = "free some space"
FULL = ("disk is full", "No space left", "File too large")

Execute = Callable[[Path, list[str]], tuple[int, str, str]]


class Disk:
    """A small disk whose free space can be set.

    Args:
        folder: where it is mounted.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._ballast = folder / ".ballast"

    @property
    def free(self) -> int:
        """Bytes that are left."""
        facts = os.statvfs(self.folder)
        return facts.f_bavail * facts.f_frsize

    def leave(self, bytes_free: int) -> None:
        """Fills the disk up to this."""
        self._ballast.unlink(missing_ok=True)
        missing = (self.free - bytes_free) // PAGE * PAGE
        with self._ballast.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, missing)

    def make_room(self) -> None:
        """Empties it again."""
        self._ballast.unlink(missing_ok=True)


@contextmanager
def small_disk(folder: Path) -> Iterator[Disk]:
    """A tmpfs at ``folder``.

    Raises:
        PermissionError: this user may not mount one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(folder)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise PermissionError(f"no tmpfs can be mounted here ({error}); run this as root") from None
    try:
        yield Disk(folder)
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def study_files(life: Path, _: str) -> dict[str, str]:
    """What a study leaves, apart from its timings: the runs' weights and metrics."""
    kept = ("weights.safetensors", "metrics.json")
    found = {n: d for n, d in digest_files(life / "study" / "runs").items() if n.endswith(kept)}
    assert (life / "study" / "report" / "study.html").exists()
    return found | {"rows.jsonl": digest_study(life / "study")}


def study(log: Path) -> Command:
    """A study of two runs on the log."""
    arguments = ["study", "study.yaml", "--source", str(log.parent), "--out", "study"]
    return Command("study", arguments, arguments, study_files)


def peak_use(disk: Disk, work: Callable[[], None]) -> int:
    """The most bytes that some work takes."""
    before, least, done = disk.free, [disk.free], threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            least[0] = min(least[0], disk.free)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        work()
    finally:
        done.set()
        watcher.join()
    return before - least[0]


def judge(
    life: Life, command: Command, code: int, out: str, err: str, whole: dict[str, str]
) -> tuple[str, str]:
    """What a command on a full disk came to, and what is wrong with it."""
    if code == 0:
        same = command.outcome(life.folder, out) == whole
        return "done", "" if same else f"ended well, with another result; {err}"
    lines = err.strip().splitlines()
    message = lines[-1] if lines else ""
    if code != 1 or "Traceback" in err or "internal error" in err:
        return "refused", f"exit code {code}: {err[-1500:]}"
    if not message.startswith("mldcn: ") or not any(word in message for word in FULL):
        return "refused", f"not clear: {err[-500:]}"
    place = message.removeprefix("mldcn: ").partition(":")[0]
    if REMEDY not in message or place in ("", "system"):
        return "refused", f"names no file, or no remedy: {message}"
    wrong = passes_for_whole(life, command, whole)
    return "refused", f"half-written, but looks whole: {wrong}" if wrong else ""


def passes_for_whole(life: Life, command: Command, whole: dict[str, str]) -> str:
    """What a later command would take for whole although it is not."""
    from mldcn.errors import UserError
    from mldcn.run import RunFolder

    if command.name == "predict" and (life.folder / "scores.csv").exists():
        return "scores.csv"
    if command.name == "encode" and (life.folder / "encoded" / "prepared.json").exists():
        return "" if command.outcome(life.folder, "") == whole else "encoded"
    if command.name == "fit":
        try:
            RunFolder.open(life.folder / "run")
        except UserError:
            return ""
        return "" if command.outcome(life.folder, "") == whole else "run"
    return ""


def check(
    disk: Disk,
    store: Path,
    log: Path,
    *,
    points: int,
    only: str | None = None,
    run: Execute = lambda life, arguments: execute(life, arguments, None),
    wanted: Callable[[Path], list[Command]] = lambda log: [*commands(log), study(log)],
) -> tuple[dict[str, Counter[str]], dict[str, int], list[str]]:
    """Fills the disk under every command.

    Args:
        disk: where the commands work.
        store: a folder elsewhere, for copies.
        log: the log, elsewhere too.
        points: how many amounts of free space each command is given.
        only: one command's name.
        run: runs a command in a folder; gives its exit code, output and messages.
        wanted: the commands, in order.

    Returns:
        How often each command was refused and done, the most bytes that each takes, and what went wrong.
    """
    counts: dict[str, Counter[str]] = {}
    peaks: dict[str, int] = {}
    violations: list[str] = []
    life = born(disk.folder / "life", log)
    write_small_study(log.parent / "config.yaml", life.folder / "study.yaml")
    for command in wanted(log):
        before = store / f"before-{command.name}"
        shutil.copytree(life.folder, before)
        peaks[command.name] = peak_use(disk, lambda c=command: until_done(life, c, []))  # type: ignore[misc]
        if life.violations:
            return counts, peaks, [*violations, *life.violations]
        whole, there = life.outcomes[command.name], names(life.folder)
        after = store / f"after-{command.name}"
        shutil.copytree(life.folder, after)
        for point in range(points if only in (None, command.name) else 0):
            shutil.rmtree(life.folder)
            shutil.copytree(before, life.folder)
            free = peaks[command.name] * point // max(points - 1, 1)
            where = f"{command.name} with {free:,} bytes free"
            disk.leave(free)
            code, out, err = run(life.folder, command.first)
            kind, wrong = judge(life, command, code, out, err, whole)
            disk.make_room()
            counts.setdefault(command.name, Counter())[kind] += 1
            if not wrong and kind == "refused":
                again = Life(life.folder)
                until_done(again, command, [], cut_off=True)
                outcome = again.outcomes.get(command.name, {})
                changed = sorted(n for n in {**whole, **outcome} if whole.get(n) != outcome.get(n))
                if again.violations or changed:
                    wrong = f"with room again: {again.violations or f'these differ: {changed}'}"
                elif names(life.folder) != there:
                    wrong = f"left behind or missing: {sorted(names(life.folder) ^ there)}"
            if wrong:
                violations.append(f"{where}: {wrong}")
        shutil.rmtree(life.folder)
        shutil.copytree(after, life.folder)
    return counts, peaks, violations


def main() -> int:
    """Prints what each command came to; the exit code is 1 where it was not as it must be."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--points", type=int, default=12, help="amounts of free space for each command")
    parser.add_argument("--rows", type=int, default=6_000, help="impressions in the log")
    parser.add_argument("--only", help="one command: encode, fit, evaluate, predict or study")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="mldcn-disk-") as folder:
        work = Path(folder).resolve()
        log = write_small_log(work / "log", options.rows, "parquet", epochs=2).parent / "pinads.parquet"
        try:
            with small_disk(work / "disk") as disk:
                counts, peaks, violations = check(
                    disk, work / "store", log, points=options.points, only=options.only
                )
        except PermissionError as error:
            print(f"skipped: {error}")
            return 0
    rows = [[name, f"{peaks[name]:,}", c["refused"], c["done"]] for name, c in counts.items()]
    print(markdown(["command", "bytes it takes", "refused", "done"], rows))
    for violation in violations:
        print(f"\n{violation}")
    print(f"\n{sum(map(Counter.total, counts.values()))} full disks, {len(violations)} violations")
    return 1 if violations else 0


if __name__ == "__main__":
    sys.exit(main())
