"""What Linux tells of a server's processes: who they are, their connections, their memory."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path


def children(pid: int) -> list[int]:
    """The processes that one started."""
    found: list[int] = []
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            found += map(int, (task / "children").read_text().split())
    return found


def family(pid: int) -> list[int]:
    """A process and all that come from it."""
    return [pid, *(each for child in children(pid) for each in family(child))]


def workers(leader: int) -> list[int]:
    """The processes that answer: those that the one which only forks has forked, and that live."""
    return [
        each
        for forker in children(leader)
        if "forkserver" in command(forker)
        for each in children(forker)
        if state(each) not in ("Z", "")
    ]


def command(pid: int) -> str:
    """A process' command line."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_text()
    return ""


def state(pid: int) -> str:
    """A letter: T is stopped, Z is dead; nothing where there is no such process."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    return ""


def ports_of(pid: int, port: int) -> set[int]:
    """The callers' ports of a process' connections at one of its ports, of those not yet accepted too."""
    inodes = {"0"}  # nobody's yet
    for file in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            name = os.readlink(file)
            if name.startswith("socket:["):
                inodes.add(name[8:-1])
    found: set[int] = set()
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        parts = line.split()
        established = parts[3] == "01"
        if established and int(parts[1].rpartition(":")[2], 16) == port and parts[9] in inodes:
            found.add(int(parts[2].rpartition(":")[2], 16))
    return found


def pss(leader: int) -> int:
    """Bytes of memory of a process and all that come from it; pages that several share count once."""
    total = 0
    for pid in family(leader):
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
                if line.startswith("Pss:"):
                    total += 1024 * int(line.split()[1])
    return total
