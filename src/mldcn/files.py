"""Files that appear whole or not at all, folders with one writer at a time, checksums, disks that are full."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import os
import re
import secrets
import shutil
import tempfile
import threading
import zlib
from collections.abc import Iterator
from pathlib import Path

from mldcn.errors import DiskFullError, UserError


def checksum(path: Path) -> str:
    """CRC-32 of a file, in hexadecimal."""
    value = 0
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            value = zlib.crc32(chunk, value)
    return f"{value:08x}"


def write_text(path: Path, text: str) -> None:
    """Writes a text file atomically."""
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def atomic(path: Path, *, flushed: bool = True) -> Iterator[Path]:
    """Gives a temporary path beside ``path``; when the block ends well, it is flushed and takes its place.

    What a killed writer of the same ``path`` left beside it is removed first. Nobody else's temporary is: each
    writer holds a lock on its own, which the kernel lets go when the process dies.

    Args:
        path: the file.
        flushed: false where the caller flushes the file and its folder later: a power cut may take it until then.
    """
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        for left in path.parent.glob(f".{glob.escape(path.name)}.*{_TEMPORARY}"):
            if _STALE.fullmatch(left.name.removeprefix(f".{path.name}")):
                _sweep(left)
        temporary, handle = _temporary(path)
        try:
            yield temporary
            if flushed:
                sync_file(temporary)
            temporary.replace(path)
            if flushed:
                sync_folder(path.parent)
        finally:
            temporary.unlink(missing_ok=True)
            os.close(handle)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Inside the block a disk that is full is an error that names the file to be written and the remedy.

    Raises:
        DiskFullError: the disk, a quota or the largest size of a file is used up.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, UserError) or not no_room(error):
            raise
        raise DiskFullError(
            f"{path}: cannot be written, the disk is full (or a quota used up); free some space and run the "
            "command again"
        ) from None


def no_room(error: Exception) -> bool:
    """Whether an error says that a disk is full. Some libraries pass on the system's words, not its number."""
    numbers = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in numbers
    return any(os.strerror(number) in str(error) for number in numbers)


_TEMPORARY = ".tmp"
_STALE = re.compile(r"\.[0-9a-f]{8}\.tmp")


def _temporary(path: Path) -> tuple[Path, int]:
    """A new, locked, empty file beside ``path``, and its handle; created as the umask wants it."""
    while True:
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}{_TEMPORARY}")
        try:
            handle = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        except FileExistsError:
            continue
        try:
            mine = _lock(handle, wait=False)
        except OSError:
            mine = True  # a file system without locks: then nobody sweeps either
        if mine and _is_at(handle, temporary):
            return temporary, handle
        os.close(handle)  # a sweeper was faster than the lock


def _sweep(left: Path) -> None:
    """Removes a temporary file whose writer is dead."""
    with contextlib.suppress(OSError):
        handle = os.open(left, os.O_RDWR)
        try:
            if _lock(handle, wait=False):
                left.unlink()
        finally:
            os.close(handle)


def sweep(folder: Path) -> None:
    """Removes the temporary files that killed writers left anywhere in a folder."""
    for left in folder.rglob(f".*{_TEMPORARY}"):
        _sweep(left)


@contextlib.contextmanager
def locked(folder: Path, *, wait: bool = False) -> Iterator[None]:
    """Keeps others out of a folder, which need not exist, while the block runs.

    The lock is a file beside the folder, so that the folder can be replaced under it. The kernel lets it go when
    the process ends, however that comes about. A thread that holds it may take it again.

    Args:
        folder: the folder.
        wait: wait for another holder to end instead of refusing.

    Raises:
        UserError: another process (or thread) holds it, and ``wait`` is false.
    """
    folder = Path(os.path.abspath(folder))
    key = (folder, threading.get_ident())
    if key in _HELD:
        yield
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    path = folder.with_name(f".{folder.name}.lock")
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            mine = _lock(handle, wait=wait)
        except OSError as error:
            os.close(handle)
            path.unlink(missing_ok=True)
            raise UserError(
                f"{folder}: its file system gives no locks ({error.strerror}), so that two runs could write into "
                "one folder; name a folder on another, a local disk"
            ) from None
        if not mine:
            holder = os.read(handle, 32).decode(errors="replace").strip()
            os.close(handle)
            who = f"process {holder}" if holder.isdecimal() else "another process"
            raise UserError(
                f"{folder}: in use by {who}; wait until it ends or stop it (kill {holder or 'PID'}), or name "
                "another folder"
            )
        if _is_at(handle, path):
            break
        os.close(handle)  # the holder before us took its file away
    try:
        with contextlib.suppress(OSError):  # on a full disk the lock holds, it only cannot say whose it is
            os.ftruncate(handle, 0)
            os.write(handle, f"{os.getpid()}\n".encode())
        _HELD.add(key)
        yield
    finally:
        _HELD.discard(key)
        path.unlink(missing_ok=True)
        os.close(handle)


_HELD: set[tuple[Path, int]] = set()  # folder and thread


def drop_dead_lock(folder: Path) -> None:
    """Removes the lock's file that a killed process left beside a folder; that of a living one stays."""
    if folder.with_name(f".{folder.name}.lock").exists():
        with contextlib.suppress(UserError), locked(folder):
            pass


@contextlib.contextmanager
def scratch(kind: str, parent: Path | None = None) -> Iterator[Path]:
    """A folder that is removed when the block ends; those that killed processes left are removed first.

    Args:
        kind: what it is for, a part of its name.
        parent: where it lies; the system's folder for temporary files by default (``TMPDIR`` names another).
    """
    parent = Path(tempfile.gettempdir()) if parent is None else parent
    prefix = f"mldcn-{kind}-"
    names = {left.name for left in parent.glob(f"{prefix}*")}
    names |= {left.name[1:].removesuffix(".lock") for left in parent.glob(f".{prefix}*.lock")}
    # This thread may take its own locks again: what it holds is no killed process's.
    mine = {folder.name for folder, _ in _HELD}
    for name in names - mine:
        with contextlib.suppress(UserError, OSError), locked(parent / name):
            shutil.rmtree(parent / name, ignore_errors=True)
    folder = parent / f"{prefix}{secrets.token_hex(4)}"
    with locked(folder):
        folder.mkdir(mode=0o700, parents=True)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _lock(handle: int, *, wait: bool) -> bool:
    """Takes the exclusive lock of an open file; says whether it was had."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            return False
        raise
    return True


def _is_at(handle: int, path: Path) -> bool:
    """Whether an open file is still the one at ``path``."""
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False


def sync_file(path: Path) -> None:
    """Flushes a file's content to the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Flushes a folder's entries, so that a rename outlives a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
