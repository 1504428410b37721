"""A bundle: all that answering needs, in one folder that is whole or not there at all.

bundle.json          target, tasks, versions, the look-ups in the tables, what the export cost in exactness
config.yaml          of the run: schema, texts that mean a missing value, sampling rates of labels
encoder/             vocabularies and fitted transforms
calibrators.json     only where the run has them
tables/              the embedding tables, one file for each width (``aoti`` and ``torch-export``)
program.*            the rest of the model; ``model.onnx`` holds the tables too
requests.*           the same for requests of several candidates, what these share computed once
sample.json          a request, and the answer that was had at export
manifest.json        the size and SHA-256 of each of the above

No file is a pickle. A bundle is used only after its sizes and checksums hold, and its sample request gives the
answer that stands beside it. Checksums find damage, not malice: whoever can write the folder can write the
manifest. What a file of a hostile bundle could do:

- ``program.pt2`` (``aoti``) holds native code, which the process runs: load such bundles only from whom you would
  run a program from. PyTorch's reader of such packages would also unpickle what else lies in a hostile one.
- ``program.json`` (``torch-export``) is a list of operations. Only those of PyTorch's own tensor library that
  exported models use are let through, none of which touches files or the system; see
  :mod:`mldcn.serving.portable`.
- ``model.onnx`` is a list of ONNX operations, run by ONNX Runtime.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._pytree import tree_map

from mldcn import __version__
from mldcn.config import load_config
from mldcn.data.encoder import Encoder
from mldcn.data.reading import digest
from mldcn.errors import UserError
from mldcn.files import locked, sync_file, sync_folder, write_text
from mldcn.metrics import calibrator_from_json
from mldcn.model import pick_device
from mldcn.serving.engine import Engine, Program, content_version
from mldcn.serving.program import LookUp, Tables

FORMAT = 2
BUNDLE = "bundle.json"
MANIFEST = "manifest.json"
SAMPLE = "sample.json"
Target = Literal["aoti", "onnx", "torch-export"]
TARGETS: tuple[Target, ...] = ("aoti", "onnx", "torch-export")
PROGRAMS: dict[Target, str] = {"aoti": "program.pt2", "onnx": "model.onnx", "torch-export": "program.json"}
REQUESTS: dict[Target, str] = {"aoti": "requests.pt2", "torch-export": "requests.json"}

# Candidates a request from which on its share is computed apart.
SHARED_FROM = 2

# Of mldcn.serving.program.Body or mldcn.serving.rewriting.PerRequest.
Function = Callable[..., Tensor]


@contextlib.contextmanager
def new_bundle(path: Path, *, overwrite: bool) -> Iterator[Path]:
    """Gives a folder to fill; when the block ends well, it is sealed by a manifest and takes its place.

    Args:
        path: where the bundle shall lie.
        overwrite: replace a bundle that is there.

    Raises:
        UserError: something is there already, and ``overwrite`` is false or it is no bundle.
    """
    begun, old = path.with_name(f".{path.name}.begun"), path.with_name(f".{path.name}.replaced")
    with locked(path):
        _check_room(path, overwrite)
        for left in (begun, old):
            shutil.rmtree(left, ignore_errors=True)
        begun.mkdir(parents=True)
        try:
            yield begun
            _seal(begun)
            if path.exists():
                path.rename(old)
            begun.rename(path)
            sync_folder(path.parent)
        finally:
            for left in (begun, old):
                shutil.rmtree(left, ignore_errors=True)


def _check_room(path: Path, overwrite: bool) -> None:
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    if not (path / BUNDLE).is_file():
        raise UserError(f"{path}: is no bundle, so it is not replaced; name another folder with --out")
    if not overwrite:
        raise UserError(
            f"{path}: holds a bundle already; replace it with --force, or name another with --out"
        )


def _seal(folder: Path) -> None:
    files = {}
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            sync_file(file)
            files[str(file.relative_to(folder))] = _sums(file)
    write_json(folder / MANIFEST, {"format": FORMAT, "files": files})


def _sums(file: Path) -> dict[str, Any]:
    return {"bytes": file.stat().st_size, "sha256": digest(file)}


def write_json(path: Path, value: Any) -> None:
    """Writes plain data as JSON, atomically."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def open_bundle(path: Path, device: str = "auto") -> Engine:
    """The engine of a bundle that was checked and has answered its sample request.

    Raises:
        UserError: a file is missing or damaged, the bundle is of another version or for another machine, or its
            answer is another than at export.
    """
    _verify(path)
    facts = _read(path / BUNDLE)
    calibrators = _read(path / "calibrators.json") if (path / "calibrators.json").is_file() else {}
    try:
        engine = Engine(
            str(facts["name"]),
            content_version(path / MANIFEST),
            load_config(path / "config.yaml"),
            Encoder.load(path / "encoder", check=False),  # the manifest's checksums held
            {task: calibrator_from_json(raw) for task, raw in calibrators.items()},
            open_program(path, facts, device),
            _read(path / SAMPLE),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path / BUNDLE}: damaged ({error!r}); export the run again") from None
    engine.check()
    return engine


def open_program(path: Path, facts: dict[str, Any], device: str) -> Program:
    """The program of a bundle, with its tables.

    Args:
        path: the bundle's folder.
        facts: what its ``bundle.json`` says.
        device: where to compute.

    Raises:
        UserError: it is for another machine or another PyTorch.
    """
    target: Target = facts["target"]
    file = path / PROGRAMS[target]
    if target == "onnx":
        return _onnx_program(file)
    place = pick_device(facts["device"] if target == "aoti" else device)

    def function(name: str) -> Function:
        if target == "aoti":
            return _aoti_function(path / name, facts, place)
        return _portable_function(path / name, place)

    def tables(plan: list[dict[str, Any]]) -> Tables:
        return Tables(path / "tables", [LookUp(**each) for each in plan])

    requests = facts.get("requests")
    per_request = None
    if requests is not None:
        sides = (tables(requests["first"]), tables(requests["own"]))
        per_request = PerRequestProgram(function(REQUESTS[target]), *sides)
    return BundleProgram(function(PROGRAMS[target]), tables(facts["look_ups"]), per_request, place)


@dataclass(frozen=True)
class PerRequestProgram:
    """What computes a request's share once: the function, the look-ups of requests and those of candidates."""

    function: Function
    first: Tables
    own: Tables


class BundleProgram:
    """The program of a bundle in two steps: look-ups in the tables, and the rest.

    Args:
        function: from ids, dense and rows of tables to logits.
        tables: where the rows lie.
        per_request: the same over requests and their candidates, where the model has features of both.
        device: where the rest is computed.
    """

    def __init__(
        self,
        function: Function,
        tables: Tables,
        per_request: PerRequestProgram | None,
        device: torch.device,
    ) -> None:
        self.function = function
        self.tables = tables
        self.per_request = per_request
        self.device = device

    def __call__(
        self,
        ids: NDArray[np.int32],
        dense: NDArray[np.float32],
        request: NDArray[np.int64] | None = None,
    ) -> NDArray[np.float32]:
        """Logits ``(N, T)``; see :class:`mldcn.serving.engine.Program`."""
        return self.compute(self.look_up(ids, dense, request))

    @torch.inference_mode()
    def look_up(
        self,
        ids: NDArray[np.int32],
        dense: NDArray[np.float32],
        request: NDArray[np.int64] | None = None,
    ) -> LookedUp:
        """The first step."""
        shared = self.per_request
        given, numbers = torch.from_numpy(ids), torch.from_numpy(dense)
        if shared is None or request is None or len(ids) < SHARED_FROM * (request[-1:] + 1).sum():
            return LookedUp(self.function, (given, numbers, self.tables.look_up(given)))
        each = torch.from_numpy(request)
        first = torch.from_numpy(np.flatnonzero(np.diff(request, prepend=-1)))
        heads = given.index_select(0, first), numbers.index_select(0, first)
        rows = shared.first.look_up(heads[0]), shared.own.look_up(given)
        return LookedUp(shared.function, (heads, (given, numbers), *rows, each))

    @torch.inference_mode()
    def compute(self, found: LookedUp) -> NDArray[np.float32]:
        """The second step."""
        logits = found.function(*tree_map(lambda tensor: tensor.to(self.device), found.inputs))
        numbers: NDArray[np.float32] = logits.cpu().numpy()
        return numbers


@dataclass(frozen=True)
class LookedUp:
    """What the second step of a :class:`BundleProgram` needs of the first."""

    function: Function
    inputs: tuple[Any, ...]


def machine(device: torch.device) -> str:
    """What native code of this machine asks of the one it runs on."""
    import platform

    if device.type == "cuda":
        return f"{platform.machine()} cuda {torch.cuda.get_device_capability(device)}"
    return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"


def _aoti_function(file: Path, facts: dict[str, Any], device: torch.device) -> Function:
    built, here = facts["torch"].split("+")[0], torch.__version__.split("+")[0]
    if built != here:
        raise UserError(
            f"{file}: was compiled for PyTorch {built}, this is {here}; export the run again with it"
        )
    if facts["machine"] != machine(device):
        raise UserError(
            f"{file}: was compiled for {facts['machine']}, this machine is {machine(device)}; export the run "
            "on this machine, or to torch-export"
        )
    index = (device.index or 0) if device.type == "cuda" else -1
    package: Function = torch._inductor.aoti_load_package(str(file), device_index=index)
    return package


def _portable_function(file: Path, device: torch.device) -> Function:
    from mldcn.serving.portable import load_portable

    return load_portable(file, device)


def _onnx_program(file: Path) -> Program:
    try:
        import onnxruntime
    except ImportError:
        raise UserError(f"{file}: needs ONNX Runtime; pip install 'mldcn[onnx]'") from None
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    wanted = {each.name for each in session.get_inputs()}

    def program(
        ids: NDArray[np.int32], dense: NDArray[np.float32], request: NDArray[np.int64] | None = None
    ) -> NDArray[np.float32]:
        given = {"ids": ids, "dense": dense}
        found = session.run(["logits"], {name: given[name] for name in wanted})
        logits: NDArray[np.float32] = found[0]
        return logits

    return program


def _verify(path: Path) -> None:
    manifest = _read(path / MANIFEST)
    if manifest.get("format") != FORMAT:
        raise UserError(
            f"{path}: a bundle of format {manifest.get('format')}; this version of mldcn ({__version__}) reads "
            f"format {FORMAT}. Export the run again, or use the mldcn version named in its {BUNDLE}"
        )
    files = manifest.get("files")
    if not isinstance(files, dict) or BUNDLE not in files or SAMPLE not in files:
        raise UserError(f"{path / MANIFEST}: damaged; export the run again")
    for name, expected in files.items():
        file = path / name
        if not file.resolve().is_relative_to(path.resolve()):
            raise UserError(f"{path / MANIFEST}: names {name!r}, which lies outside; export the run again")
        if not file.is_file():
            raise UserError(f"{file}: missing from the bundle; export the run again or restore the file")
        if expected != _sums(file):
            raise UserError(f"{file}: damaged (its checksum is not the manifest's); export the run again")
    for file in path.rglob("*"):
        if file.is_file() and file != path / MANIFEST and str(file.relative_to(path)) not in files:
            raise UserError(f"{file}: is no part of the bundle; remove it")


def _read(path: Path) -> dict[str, Any]:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}); export the run again") from None
    except ValueError as error:
        raise UserError(f"{path}: damaged, not JSON ({error}); export the run again") from None
    if not isinstance(raw, dict):
        raise UserError(f"{path}: damaged, expected a mapping; export the run again")
    return raw
