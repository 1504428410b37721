"""Which models and versions are served: loaded from folders, warmed up, swapped while requests run.

A request picks a version once and keeps it to its end, so that none is answered by two; one that was replaced
lives until its last request is answered.
"""

from __future__ import annotations

import asyncio
import gc
import hashlib
import logging
import re
import threading
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mldcn.config import suggest
from mldcn.errors import UserError
from mldcn.serving.engine import Engine
from mldcn.serving.refused import Reason, Refused
from mldcn.serving.remote import TableServer
from mldcn.serving.server.options import Batching

log = logging.getLogger("mldcn.serving")

# A folder is a model's when it has one of these; they change whenever its content does.
_MARKS = ("manifest.json", "run.json", "bundle.json")
WARM_UP_CALLS = 3
_REPLACEMENT_SECONDS = 0.5

Tune = Callable[[str, Engine], Batching]


@dataclass(frozen=True)
class Version:
    """A version that answers."""

    model: str
    label: str
    engine: Engine
    batching: Batching | None = None  # where it is not as the server was told


@dataclass(frozen=True)
class Place:
    """A folder that holds a version. ``label`` is the version's name; None takes the content's hash."""

    model: str | None
    path: Path
    label: str | None = None

    def state(self) -> tuple[object, ...]:
        """Changes whenever the folder's content is replaced."""
        marks = [self.path.resolve() / name for name in _MARKS]
        stats = [mark.stat() if mark.is_file() else None for mark in marks]
        return (marks[0], *(stat and (stat.st_ino, stat.st_mtime_ns, stat.st_size) for stat in stats))


def parse_path(text: str) -> tuple[str | None, Path]:
    """``NAME=FOLDER`` or ``FOLDER``."""
    name, equals, path = text.partition("=")
    if equals and re.fullmatch(r"[A-Za-z0-9_.-]+", name):
        return name, Path(path)
    return None, Path(text)


def places(roots: Sequence[tuple[str | None, Path]]) -> list[Place]:
    """The versions that folders hold, older ones first.

    A folder is a run or a bundle, or holds such by model, ``<model>``, or by model and version,
    ``<model>/<version>``.
    """
    found: list[Place] = []
    for name, root in roots:
        children = [] if _is_model(root) or not root.is_dir() else _folders(root)
        inside: list[Place] = []
        for child in children:
            if _is_model(child):
                inside.append(Place(name or child.name, child, child.name if name else None))
            else:
                versions = [each for each in _folders(child) if _is_model(each)]
                inside += [Place(name or child.name, each, each.name) for each in versions]
        # With nothing in it, the folder itself is tried, whose loading says what is wrong.
        found += inside or [Place(name, root)]
    return found


def _is_model(path: Path) -> bool:
    return any((path / mark).is_file() for mark in _MARKS)


def _folders(path: Path) -> list[Path]:
    """The folders of a folder, by name; numbers in names by their size."""

    def order(folder: Path) -> list[tuple[int, int, str]]:
        parts = re.split(r"(\d+)", folder.name)
        return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in parts if part]

    return sorted((each for each in path.iterdir() if each.is_dir() and each.name[0] != "."), key=order)


@dataclass(frozen=True)
class Prepared:
    """Versions that are loaded and warm, for :meth:`Repository.switch`.

    Attributes:
        loaded: versions by folder, with the folder's state.
        models: the versions of each model, older ones first.
        hidden: models that are left out.
    """

    loaded: dict[Place, tuple[tuple[object, ...], Version]]
    models: dict[str, list[Version]]
    hidden: frozenset[str]

    @property
    def contents(self) -> list[str]:
        """What is served, a line a version; the same lines in two processes are the same versions."""
        return [f"{each.model} {each.label} {state}" for state, each in self.loaded.values()]


class Repository:
    """The versions that are served.

    Args:
        roots: names (None: the folder's) and folders.
        device: where models compute.
        canary: share of the users whom a model's newest version answers while an older one is there.
        tune: says how a model's requests are batched, given its name and engine, once it is warm.
        changed: told ``(model, version or None, result)`` of each version that was loaded, failed or was dropped.
        tables: the server that holds the bundles' tables; None reads those of their folders.
    """

    def __init__(
        self,
        roots: Sequence[tuple[str | None, Path]],
        device: str = "auto",
        canary: float | None = None,
        tune: Tune | None = None,
        changed: Callable[[str, str | None, str], None] = lambda *_: None,
        tables: TableServer | None = None,
    ) -> None:
        self._roots = list(roots)
        self._device = device
        self._tables = tables
        self._canary = canary
        self._tune = tune
        self._changed = changed
        self._loaded: dict[Place, tuple[tuple[object, ...], Version]] = {}
        self._prepared: dict[Place, tuple[tuple[object, ...], Version]] = {}  # not served yet
        self._failed: dict[Place, tuple[object, ...]] = {}
        self._hidden: frozenset[str] = frozenset()
        self._models: dict[str, list[Version]] = {}
        self._lock = asyncio.Lock()
        self.ready = False

    @property
    def models(self) -> dict[str, list[Version]]:
        """The versions of each model, older ones first."""
        return self._models

    async def load(self) -> None:
        """Loads everything for the first time.

        Raises:
            UserError: a folder cannot be loaded, or two versions have one name.
        """
        await self._refresh(self._hidden, strict=True)
        self.ready = True

    async def refresh(self) -> None:
        """Looks at the folders again: loads what is new or was replaced, drops what is gone.

        A version that cannot be loaded leaves the one before it in its place; it is tried again when its folder
        changes.
        """
        await self._refresh(self._hidden)

    async def show(self, model: str) -> None:
        """Looks at the folders again, and serves a model that was hidden.

        Raises:
            Refused: there is no such model, or its newest content cannot be loaded.
        """
        await self._refresh(self._hidden - {model}, again=True)
        self.check_shown(model)

    def check_shown(self, model: str) -> None:
        """Refuses where a model is not served, or not with its newest content."""
        if model not in self._models:
            raise Refused(Reason.NOT_FOUND, f"no model {model!r} can be loaded")
        if any(self._name(place) == model for place in self._failed):
            raise Refused(Reason.INVALID, f"model {model!r}: its new content cannot be loaded; see the log")

    async def hide(self, model: str) -> None:
        """Serves a model no more."""
        self.pick(model)
        await self._refresh(self._hidden | {model})

    def pick(self, model: str | None, label: str = "", routing_key: str | None = None) -> Version:
        """The version that answers a request.

        Args:
            model: None for the only one.
            label: a version; empty for the newest, or the one before it: with a canary, the newest answers only
                its share of the routing keys, always the same ones, and no request without a key.
            routing_key: whom the request is for, a user's id for example.

        Raises:
            Refused: it is not there.
        """
        if model is None:
            if len(self._models) != 1:
                raise Refused(Reason.INVALID, "model: there are several; name one")
            model = next(iter(self._models))
        versions = self._models.get(model)
        if versions is None:
            raise Refused(Reason.NOT_FOUND, f"no model {model[:200]!r}{suggest(model[:200], self._models)}")
        if label:
            for version in versions:
                if version.label == label:
                    return version
            raise Refused(Reason.NOT_FOUND, f"model {model!r} has no version {label[:200]!r}")
        if self._canary is None or len(versions) == 1:
            return versions[-1]
        chosen = routing_key is not None and share_of(model, routing_key) < self._canary
        return versions[-1] if chosen else versions[-2]

    async def prepare(
        self, hidden: Collection[str] = (), *, strict: bool = False, again: bool = False
    ) -> Prepared:
        """Loads what :meth:`switch` will serve; nobody is answered otherwise before that.

        Args:
            hidden: models that are not to be served.
            strict: raise what a version cannot be loaded for, rather than leave the one before it.
            again: try what could not be loaded before, though it has not changed.

        Raises:
            UserError: ``strict``, and a folder cannot be loaded or two versions have one name.
        """
        if again:
            self._failed.clear()
        found = await asyncio.to_thread(places, self._roots)
        if set(self._loaded) - set(found):
            # Between the two renames of a replacement a folder is not there.
            await asyncio.sleep(_REPLACEMENT_SECONDS)
            found = await asyncio.to_thread(places, self._roots)
        kept: dict[Place, tuple[tuple[object, ...], Version]] = {}
        for place in found:
            if self._name(place) in hidden:
                continue
            loaded = await self._loaded_anew(place, self._loaded.get(place), strict)
            if loaded is not None:
                kept[place] = loaded
        models: dict[str, list[Version]] = {}
        for _, version in kept.values():
            versions = models.setdefault(version.model, [])
            if any(each.label == version.label for each in versions):
                message = f"{version.model}: two folders hold version {version.label}; remove one"
                if strict:
                    raise UserError(message)
                log.error(message)
                continue
            versions.append(version)
        if strict and not models and not hidden:
            raise UserError("no model to serve; name a run's folder, a bundle's, or a folder of such")
        self._prepared = kept
        return Prepared(kept, models, frozenset(hidden))

    def switch(self, prepared: Prepared) -> None:
        """From here on new requests go to the versions that were prepared, all at once."""
        before = {id(version): version for versions in self._models.values() for version in versions}
        after = {id(version): version for versions in prepared.models.values() for version in versions}
        self._loaded, self._models, self._hidden = prepared.loaded, prepared.models, prepared.hidden
        self._prepared = {}
        for key, version in after.items():
            if key not in before:
                log.info("model %s: version %s is ready", version.model, version.label)
                self._changed(version.model, version.label, "loaded")
        names = {(version.model, version.label) for version in after.values()}
        for version in before.values():
            if (version.model, version.label) not in names:
                log.info("model %s: version %s is served no more", version.model, version.label)
                self._changed(version.model, version.label, "dropped")
        # In another thread the server is a part of another program.
        if before.keys() != after.keys() and threading.current_thread() is threading.main_thread():
            _settle()

    async def _refresh(self, hidden: Collection[str], *, strict: bool = False, again: bool = False) -> None:
        async with self._lock:
            self.switch(await self.prepare(hidden, strict=strict, again=again))

    async def _loaded_anew(
        self, place: Place, before: tuple[tuple[object, ...], Version] | None, strict: bool
    ) -> tuple[tuple[object, ...], Version] | None:
        # A link that comes to point elsewhere meanwhile must not mix two contents.
        real = replace(place, path=place.path.resolve())
        try:
            state = real.state()
        except OSError:
            return before  # it is being replaced just now
        if self._failed.get(place) == state or (before is not None and before[0] == state):
            return before
        prepared = self._prepared.get(place)
        if prepared is not None and prepared[0] == state:
            return prepared
        name = self._name(place)
        try:
            version = await asyncio.to_thread(_load, real, self._device, self._tune, self._tables)
        except Exception as error:
            if strict:
                raise
            log.error("model %s: cannot be loaded, the version before stays: %s", name, error)
            self._failed[place] = state
            self._changed(name, None, "failed")
            return before
        self._failed.pop(place, None)
        return state, version

    def _name(self, place: Place) -> str:
        return place.model or place.path.resolve().name


def _load(place: Place, device: str, tune: Tune | None, tables: TableServer | None) -> Version:
    """Loads and warms up a version; it answers its sample request before anybody else's."""
    engine = Engine.load(place.path, device, tables)
    engine.check()
    sample = engine.sample()
    for _ in range(WARM_UP_CALLS):
        engine.rank(sample["constant"], sample["candidates"])
    name = place.model or place.path.resolve().name
    return Version(name, place.label or engine.version, engine, tune and tune(name, engine))


def share_of(model: str, routing_key: str) -> float:
    """Where a key lies in [0, 1), the same in every process; other models draw other users."""
    digest = hashlib.blake2b(
        f"{model}\0{routing_key}".encode("utf-8", "surrogatepass"), digest_size=8
    ).digest()
    return int.from_bytes(digest, "big") / 2**64


def _settle() -> None:
    """Takes all that is there out of the sight of Python's collector of cycles.

    It passes over all objects again and again, and holds up every request meanwhile: for 0.1 to 0.2 s when PyTorch
    and a model are loaded, which are there to stay.
    """
    gc.unfreeze()
    gc.collect()
    gc.freeze()
