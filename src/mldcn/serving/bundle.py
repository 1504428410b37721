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
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from mldcn import __version__
from mldcn.config import load_config
from mldcn.data.encoder import Encoder
from mldcn.data.reading import digest
from mldcn.errors import UserError
from mldcn.files import locked, sync_file, sync_folder, write_text
from mldcn.metrics import calibrator_from_json
from mldcn.model import pick_device
from mldcn.serving.engine import Engine, Program, content_version
from mldcn.serving.hybrid import BundleProgram, Function, PerRequestProgram
from mldcn.serving.program import LookUp, OpenTable, Tables, table_files
from mldcn.serving.refused import Refused
from mldcn.serving.remote import RemoteTables, TableServer
from mldcn.serving.transfer import Transfer

FORMAT = 2
BUNDLE = "bundle.json"
MANIFEST = "manifest.json"
SAMPLE = "sample.json"
Target = Literal["aoti", "onnx", "torch-export"]
TARGETS: tuple[Target, ...] = ("aoti", "onnx", "torch-export")
PROGRAMS: dict[Target, str] = {"aoti": "program.pt2", "onnx": "model.onnx", "torch-export": "program.json"}
REQUESTS: dict[Target, str] = {"aoti": "requests.pt2", "torch-export": "requests.json"}


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


def open_bundle(path: Path, device: str = "auto", tables: TableServer | None = None) -> Engine:
    """The engine of a bundle that was checked and has answered its sample request.

    Args:
        path: the bundle's folder.
        device: where to compute.
        tables: the server that holds its tables; None reads them from the folder.

    Raises:
        UserError: a file is missing or damaged, the bundle is of another version or for another machine, its
            tables cannot be had, or its answer is another than at export.
    """
    facts = verified(path, tables=tables is None)
    calibrators = _read(path / "calibrators.json") if (path / "calibrators.json").is_file() else {}
    try:
        remote = None if tables is None else _remote(path, facts, tables)
        engine = Engine(
            str(facts["name"]),
            content_version(path / MANIFEST),
            load_config(path / "config.yaml"),
            Encoder.load(path / "encoder", check=False),  # the manifest's checksums held
            {task: calibrator_from_json(raw) for task, raw in calibrators.items()},
            open_program(path, facts, device, remote),
            _read(path / SAMPLE),
            remote,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path / BUNDLE}: damaged ({error!r}); export the run again") from None
    try:
        engine.check()
    except Refused as error:
        raise UserError(f"{path}: its sample request is refused: {error}") from None
    return engine


def _remote(path: Path, facts: dict[str, Any], server: TableServer) -> RemoteTables:

    plan = plan_of(facts)
    if not plan:
        raise UserError(
            f"{path}: has its tables in its program, which --tables cannot replace; export the run to "
            "torch-export or aoti"
        )
    return RemoteTables(server, content_version(path / MANIFEST), plan)


def plan_of(facts: dict[str, Any]) -> list[LookUp]:
    """The look-ups of a bundle; none where the program holds the tables."""
    return look_ups(facts["look_ups"])


def look_ups(plan: list[dict[str, Any]]) -> list[LookUp]:
    """Look-ups as ``bundle.json`` says them."""
    return [LookUp(**each) for each in plan]


def open_program(
    path: Path, facts: dict[str, Any], device: str, open_table: OpenTable | None = None
) -> Program:
    """The program of a bundle, with its tables.

    Args:
        path: the bundle's folder.
        facts: what its ``bundle.json`` says.
        device: where to compute.
        open_table: gives the tables; None maps the bundle's files.

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

    opened = open_table or table_files(path / "tables")

    def tables(plan: list[dict[str, Any]]) -> Tables:
        return Tables(opened, look_ups(plan))

    requests = facts.get("requests")
    per_request = None
    if requests is not None:
        sides = (tables(requests["first"]), tables(requests["own"]))
        per_request = PerRequestProgram(function(REQUESTS[target]), *sides)
    transfer = None if place.type == "cpu" else Transfer(place)
    return BundleProgram(function(PROGRAMS[target]), tables(facts["look_ups"]), per_request, transfer)


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
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = torch.get_num_threads()
    # Threads that wait in a loop take the cores from those that read the next requests.
    settings.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(str(file), settings, providers=["CPUExecutionProvider"])
    wanted = {each.name for each in session.get_inputs()}

    def program(
        ids: NDArray[np.int32], dense: NDArray[np.float32], request: NDArray[np.int64] | None = None
    ) -> NDArray[np.float32]:
        given = {"ids": ids, "dense": dense}
        found = session.run(["logits"], {name: given[name] for name in wanted})
        logits: NDArray[np.float32] = found[0]
        return logits

    return program


def verified(path: Path, *, tables: bool = True) -> dict[str, Any]:
    """What the ``bundle.json`` of a bundle says whose files are whole.

    Args:
        path: the bundle's folder.
        tables: whether those of the tables must be there.

    Raises:
        UserError: one is not, or the bundle is of another version.
    """
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
            if not tables and name.startswith("tables/"):
                continue
            raise UserError(f"{file}: missing from the bundle; export the run again or restore the file")
        if expected != _sums(file):
            raise UserError(f"{file}: damaged (its checksum is not the manifest's); export the run again")
    for file in path.rglob("*"):
        if file.is_file() and file != path / MANIFEST and str(file.relative_to(path)) not in files:
            raise UserError(f"{file}: is no part of the bundle; remove it")
    return _read(path / BUNDLE)


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
