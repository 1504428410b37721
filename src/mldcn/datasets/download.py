"""Fetching a publisher's file: resumed where it broke off, checked, and named only when it is whole."""

from __future__ import annotations

import hashlib
import json
import os
import re
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

from mldcn.errors import UserError

BLOCK = 1 << 20
Progress = Callable[[int, int], None]


def download(
    url: str,
    target: Path,
    *,
    size: int | None = None,
    md5: str | None = None,
    progress: Progress | None = None,
    timeout: float = 60.0,
) -> Path:
    """Fetches ``url`` into ``target`` by way of ``target.part``, which a later call goes on with.

    Args:
        url: of the file.
        target: the file to write; kept as it is where it has the checksum (or size) already.
        size: of the whole file in bytes, where known.
        md5: of the whole file, where known.
        progress: is called with (bytes done, bytes in all, or 0 where unknown).
        timeout: seconds without a byte before giving up.

    Raises:
        UserError: the server cannot be reached, or what came is not the file that was published.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.exists() and _fault(target, size, md5) is None:
        return target
    part = target.with_name(target.name + ".part")
    if size is not None and part.exists() and part.stat().st_size > size:
        part.unlink()
    if size is None or not part.exists() or part.stat().st_size < size:
        try:
            _receive(url, part, progress, timeout)
        except (urllib.error.URLError, OSError) as error:
            raise UserError(
                f"{url}: cannot be fetched ({error}); what came is kept in {part}, and the same command goes "
                "on from there. Or download it by other means and give it with --source"
            ) from None
    fault = _fault(part, size, md5)
    if fault is not None:
        part.unlink()
        raise UserError(f"{url}: {fault}; the download was thrown away, try again")
    os.replace(part, target)
    return target


def published_md5(url: str, name: str, timeout: float = 60.0) -> str:
    """The checksum that a publisher gives for the file ``name``: an ``.md5`` file, or a Zenodo record.

    Raises:
        UserError: it cannot be read, or names no checksum for the file.
    """
    try:
        with urllib.request.urlopen(url, timeout=timeout) as answer:
            text = answer.read(BLOCK).decode("utf-8", "replace")
    except (urllib.error.URLError, OSError) as error:
        raise UserError(f"{url}: the publisher's checksum cannot be fetched ({error})") from None
    if text.lstrip().startswith("{"):
        try:
            files = json.loads(text).get("files", [])
        except ValueError:
            files = []
        text = " ".join(str(entry.get("checksum", "")) for entry in files if entry.get("key") == name)
    found = re.search(r"\b[0-9a-fA-F]{32}\b", text)
    if found is None:
        raise UserError(f"{url}: holds no MD5 checksum of {name}")
    return found.group().lower()


def _receive(url: str, part: Path, progress: Progress | None, timeout: float) -> None:
    done = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"User-Agent": "mldcn"})
    if done:
        request.add_header("Range", f"bytes={done}-")
    try:
        answer = urllib.request.urlopen(request, timeout=timeout)
    except urllib.error.HTTPError as error:
        if error.code == 416 and done:  # nothing is left to send: the part is whole
            return
        raise
    with answer:
        # A server that knows no ranges answers 200 and sends all of it again.
        resumed = answer.status == 206
        done = done if resumed else 0
        length = int(answer.headers.get("Content-Length") or 0)
        whole = done + length if length else 0
        with part.open("ab" if resumed else "wb") as file:
            while block := answer.read(BLOCK):
                file.write(block)
                done += len(block)
                if progress is not None:
                    progress(done, whole)
        if whole and done < whole:
            raise OSError(f"the connection ended after {done:,} of {whole:,} bytes")


def _fault(path: Path, size: int | None, md5: str | None) -> str | None:
    """What is wrong with a file, None if nothing that can be told."""
    found = path.stat().st_size
    if size is not None and found != size:
        return f"has {found:,} bytes where the publisher's file has {size:,}"
    if md5 is not None:
        digest = hashlib.md5(usedforsecurity=False)
        with path.open("rb") as file:
            while block := file.read(BLOCK):
                digest.update(block)
        if digest.hexdigest() != md5:
            return f"has MD5 {digest.hexdigest()} where the publisher gives {md5}"
    return None
