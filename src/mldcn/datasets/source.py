"""Finding a publisher's files in what a user has: a file, a folder, or the archive as it was downloaded."""

from __future__ import annotations

import os
import shutil
import tarfile
import zipfile
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import polars as pl

from mldcn.errors import UserError

ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz")
Prepared = tuple[list[Path], dict[str, Any]]
Prepare = Callable[[Path, Path], Prepared]


class Source:
    """The files of one log, wherever under ``path`` they lie.

    Args:
        path: a folder, an archive, or one of the files itself (its neighbours count then).
        scratch: where an archive's members are unpacked, by their bare names.
    """

    def __init__(self, path: Path, scratch: Path) -> None:
        if not path.exists():
            raise UserError(f"{path}: no such file or folder")
        self.path = path
        self._scratch = scratch
        self._archive = path.is_file() and path.name.endswith(ARCHIVES)
        self._folder = path if path.is_dir() else path.parent

    def all(self, pattern: str) -> list[Path]:
        """Files whose bare name fits ``pattern``, sorted by name."""
        if self._archive:
            return self._unpack(pattern)
        found = {file.name: file for file in sorted(self._folder.rglob("*"), reverse=True)}
        return [found[name] for name in sorted(found) if fnmatch(name, pattern) and found[name].is_file()]

    def one(self, *patterns: str) -> Path | None:
        """The first file that fits the first pattern that any file fits."""
        for pattern in patterns:
            found = self.all(pattern)
            if found:
                return found[0]
        return None

    def need(self, *patterns: str) -> Path:
        """Like :meth:`one`.

        Raises:
            UserError: there is none.
        """
        found = self.one(*patterns)
        if found is None:
            raise UserError(f"{self.path}: holds no {' or '.join(patterns)}")
        return found

    def _unpack(self, pattern: str) -> list[Path]:
        self._scratch.mkdir(parents=True, exist_ok=True)
        try:
            if self.path.suffix == ".zip":
                with zipfile.ZipFile(self.path) as archive:
                    return self._unzip(archive, pattern)
            with tarfile.open(self.path) as tar:
                return self._untar(tar, pattern)
        except (zipfile.BadZipFile, tarfile.TarError, EOFError) as error:
            raise UserError(f"{self.path}: not a readable archive ({error}); download it again") from None

    def _unzip(self, archive: zipfile.ZipFile, pattern: str) -> list[Path]:
        found = []
        for entry in archive.infolist():
            if not entry.is_dir() and fnmatch(Path(entry.filename).name, pattern):
                with archive.open(entry) as member:
                    found.append(self._write(member, Path(entry.filename).name, entry.file_size))
        return sorted(found)

    def _untar(self, archive: tarfile.TarFile, pattern: str) -> list[Path]:
        found = []
        for entry in archive:
            if entry.isfile() and fnmatch(Path(entry.name).name, pattern):
                member = archive.extractfile(entry)
                assert member is not None  # it is a plain file
                found.append(self._write(member, Path(entry.name).name, entry.size))
        return sorted(found)

    def _write(self, member: Any, name: str, size: int) -> Path:
        # Only the bare name is used, so no member can be written outside of scratch.
        target = self._scratch / name
        if target.exists() and target.stat().st_size == size:
            return target
        part = target.with_name(name + ".part")
        with part.open("wb") as file:
            shutil.copyfileobj(member, file, 1 << 20)
        os.replace(part, target)
        return target


def sink(frame: pl.LazyFrame, target: Path, where: Path) -> Path:
    """Streams a query into a Parquet file that takes its name when it is whole.

    Raises:
        UserError: a file of the publisher's does not hold what its format says.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(target.name + ".part")
    try:
        frame.sink_parquet(part)
    except (pl.exceptions.PolarsError, OSError) as error:
        part.unlink(missing_ok=True)
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{where}: not the publisher's format: {reason}") from None
    os.replace(part, target)
    return target


def text(path: Path, *, separator: str = ",", columns: tuple[str, ...] = ()) -> pl.LazyFrame:
    """A text file with every column as text; ``columns`` names those of a file without a header."""
    frame = pl.scan_csv(
        path,
        separator=separator,
        has_header=not columns,
        infer_schema=False,
        quote_char=None if columns else '"',
        encoding="utf8-lossy",
    )
    if not columns:
        return frame
    try:
        found = frame.collect_schema().names()
    except pl.exceptions.PolarsError as error:
        raise UserError(f"{path}: cannot be read: {str(error).splitlines()[0]}") from None
    if len(found) != len(columns):
        raise UserError(f"{path}: its first line has {len(found)} columns where {len(columns)} belong")
    return frame.rename(dict(zip(found, columns, strict=True)))


def double_colon(path: Path, columns: tuple[str, ...]) -> pl.LazyFrame:
    """A file cut at ``::``, as MovieLens-1M's are (a separator of two characters no CSV reader takes)."""
    # No byte of these files is 0x01, so a line is one cell.
    lines = text(path, separator="\x01", columns=("line",))
    parts = pl.col("line").str.split_exact("::", len(columns) - 1).struct.rename_fields(list(columns))
    return lines.select(parts.alias("parts")).unnest("parts")


def categorical(names: tuple[str, ...], source: str, min_count: int = 1) -> list[dict[str, Any]]:
    """Categorical features of a config, with a vocabulary each."""
    encoding = {"kind": "vocabulary", "min_count": min_count}
    return [{"name": name, "kind": "categorical", "source": source, "encoding": encoding} for name in names]
