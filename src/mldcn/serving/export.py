"""``mldcn export``: a finished run becomes a bundle, with a program that needs none of the model's Python code."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mldcn import __version__
from mldcn.config import dump_config
from mldcn.data.batch import EncodedLayout
from mldcn.errors import UserError
from mldcn.files import write_text
from mldcn.metrics import non_inferior
from mldcn.model import pick_device
from mldcn.predict import Predictor
from mldcn.serving.bundle import (
    BUNDLE,
    PROGRAMS,
    REQUESTS,
    SAMPLE,
    Target,
    machine,
    new_bundle,
    open_program,
    write_json,
)
from mldcn.serving.engine import Engine, Program
from mldcn.serving.portable import save_portable
from mldcn.serving.program import Body, LookUp, Tables, look_ups, table_files
from mldcn.serving.ranks import cut_ranks
from mldcn.serving.sharing import divided, merged, per_request
from mldcn.serving.store import KINDS, Kind, write_table
from mldcn.serving.validation import AucChange, described, validation
from mldcn.serving.whole import Whole

DType = Literal["fp32", "bf16"]
OPSET = 20
_EXAMPLE_ROWS = 7
_COMPARED_ROWS = 1_000
_CANDIDATES = 13  # of a request, of these rows
# How far a bundle's answers may lie from those at its export (another machine rounds otherwise), by dtype, and
# from the run's own where nothing was rounded.
_TOLERANCE = {"fp32": 1e-5, "bf16": 2e-2}


@dataclass(frozen=True)
class Exported:
    """What :func:`export_run` wrote.

    Attributes:
        path: the bundle's folder.
        sizes: bytes by file.
        difference: the largest between its probabilities and the run's, before calibration, on made-up rows.
        rows: how many these were.
        auc: how its AUC differs from the run's, by task, where a validation log was given.
        cut: FLOPs of the cross layers per row, before and after, where ``max_rank`` was given.
    """

    path: Path
    sizes: dict[str, int]
    difference: float
    rows: int
    auc: AucChange = field(default_factory=dict)
    cut: tuple[int, int] | None = None


def export_run(
    predictor: Predictor,
    to: Target,
    out: Path,
    *,
    dtype: DType = "fp32",
    embeddings: Kind = "fp32",
    device: str = "cpu",
    overwrite: bool = False,
    validation_log: Sequence[Path] = (),
    max_auc_loss: float | None = None,
    max_rank: int | None = None,
) -> Exported:
    """Writes the bundle of a run. Its model is used up.

    Args:
        predictor: the run, on the CPU.
        to: ``aoti``: compiled for this machine. ``torch-export``: operations that PyTorch runs anywhere.
            ``onnx``: for ONNX Runtime, tables and calibrators inside.
        out: the bundle's folder.
        dtype: of the dense weights and of the work.
        embeddings: of the tables.
        device: that ``aoti`` compiles for.
        overwrite: replace a bundle that is there.
        validation_log: files with labels, on which the program's AUC is compared with the run's.
        max_auc_loss: refuse a program whose AUC may be lower by more, of any task: one whose difference has a
            95 % interval that goes beyond.
        max_rank: of the cross layers, cut to it where that makes them cheaper; wants both of the above.

    Raises:
        UserError: the model cannot be exported so, or its program computes something else, or too little.
    """
    if max_auc_loss is not None and not (validation_log and max_auc_loss > 0):
        raise UserError("--max-auc-loss: a number above 0, with a log to measure it on as --validation")
    if max_rank is not None and max_auc_loss is None:
        raise UserError(
            f"--max-rank {max_rank}: say what it may cost: --max-auc-loss, measured on a log as --validation"
        )
    if to == "onnx" and dtype == "bf16":
        raise UserError("--dtype bf16: ONNX Runtime has no bf16 matrix products on a CPU; export to aoti")
    if embeddings not in KINDS:
        raise UserError(f"--embeddings {embeddings}: use {', '.join(KINDS)}")
    place = pick_device(device)
    if place.type != "cpu" and to != "aoti":
        raise UserError(
            f"--device {device}: only aoti compiles for a device; the others choose when they load"
        )
    engine = Engine.of_predictor(predictor)
    request = engine.sample()
    compared = made_up(predictor.encoder.layout, _COMPARED_ROWS)
    expected = engine.program(*compared)
    with contextlib.ExitStack() as stack:
        judge = stack.enter_context(validation(predictor, validation_log)) if validation_log else None
        # From here on the model is changed.
        cut = None if max_rank is None else cut_ranks(predictor.model, max_rank)
        meant = expected if cut is None else engine.program(*compared)
        folder = stack.enter_context(new_bundle(out, overwrite=overwrite))
        plan = look_ups(predictor.model, embeddings)
        facts: dict[str, Any] = {
            "name": engine.name,
            "run": engine.version,
            "target": to,
            "tasks": list(engine.tasks),
            "dtype": dtype,
            "embeddings": embeddings,
            "device": str(place),
            "machine": machine(place),
            "mldcn": __version__,
            "torch": torch.__version__,
            "opset": OPSET if to == "onnx" else None,
            "max_rank": max_rank,
            "look_ups": [each.to_json() for each in plan] if to != "onnx" else [],
        }
        write_text(folder / "config.yaml", dump_config(predictor.config))
        predictor.encoder.save(folder / "encoder")
        if predictor.calibrators:
            saved = {task: each.to_json() for task, each in predictor.calibrators.items()}
            write_json(folder / "calibrators.json", saved)
        facts["requests"] = _write_program(predictor, plan, to, dtype, place, folder)
        program = open_program(folder, facts, str(place))
        wrong = max(_apart(program, compared, meant), _apart_by_request(program, predictor, compared))
        difference = wrong if cut is None else _apart(program, compared, expected)
        if dtype == embeddings == "fp32" and not wrong <= _TOLERANCE["fp32"]:
            raise UserError(
                f"the exported program's probabilities differ from the run's by up to {wrong:.2g}; please "
                "report the model's config, and serve the run's own folder"
            )
        change = {} if judge is None else judge.auc_change(program)
        _accept(change, max_auc_loss)
        measured = {
            "difference": difference,
            "rows_compared": _COMPARED_ROWS,
            "auc": {task: {"run": each.a, "bundle": each.b} for task, each in change.items()},
        }
        write_json(folder / BUNDLE, {**facts, **measured})
        exported = Engine(engine.name, "", engine.config, engine.encoder, predictor.calibrators, program)
        answer = exported.rank(request["constant"], request["candidates"]).probabilities
        sample = {"request": request, "probabilities": answer.tolist(), "tolerance": _TOLERANCE[dtype]}
        write_json(folder / SAMPLE, sample)
    sizes = {
        str(file.relative_to(out)): file.stat().st_size for file in sorted(out.rglob("*")) if file.is_file()
    }
    return Exported(out, sizes, difference, _COMPARED_ROWS, change, cut)


def _accept(change: AucChange, most: float | None) -> None:
    for task, difference in change.items():
        if most is not None and not non_inferior(difference, most):
            (line,) = described({task: difference})
            raise UserError(
                f"{line}; a loss of more than --max-auc-loss {most:g} is not excluded: keep more of the model's "
                "numbers, or validate on more rows"
            )


def made_up(layout: EncodedLayout, rows: int, seed: int = 0) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Encoded rows with ids drawn evenly from each table and normal numbers."""
    rng = np.random.default_rng(seed)
    ids = np.zeros((rows, layout.num_id_columns), np.int32)
    for slot in layout.ids:
        ids[:, slot.columns] = rng.integers(0, layout.tables[slot.table], (rows, slot.length * slot.hashes))
    return ids, rng.standard_normal((rows, layout.num_dense_columns), np.float32)


def _apart(
    program: Program, rows: tuple[NDArray[np.int32], NDArray[np.float32]], expected: NDArray[np.float32]
) -> float:
    found, wanted = torch.from_numpy(program(*rows)), torch.from_numpy(expected)
    return float((torch.sigmoid(found) - torch.sigmoid(wanted)).abs().max())


def _apart_by_request(
    program: Program, predictor: Predictor, rows: tuple[NDArray[np.int32], NDArray[np.float32]]
) -> float:
    """How far the same rows' probabilities lie apart when they are computed as those of requests."""
    division = divided(predictor.config.log_schema, predictor.encoder.layout, [])
    if division is None:
        return 0.0
    request = np.arange(len(rows[0])) // _CANDIDATES
    ids, dense = rows[0].copy(), rows[1].copy()
    for each, shared in zip((ids, dense), division.columns, strict=True):
        each[:, shared] = each[request * _CANDIDATES][:, shared]
    found, wanted = (torch.from_numpy(program(ids, dense, each)) for each in (request, None))
    return float((torch.sigmoid(found) - torch.sigmoid(wanted)).abs().max())


def _write_program(
    predictor: Predictor, plan: list[LookUp], to: Target, dtype: DType, device: torch.device, folder: Path
) -> dict[str, Any] | None:
    """Writes the tables, where they lie outside, and the program. The model is used up.

    Returns:
        The look-ups of the program over requests, where there is one.
    """
    model = predictor.model
    weights = [weight.detach() for weight in model.tables().values()]
    body = (
        Body(model, torch.bfloat16 if dtype == "bf16" else torch.float32)
        .to(device)
        .eval()
        .requires_grad_(False)
    )
    ids, dense = (torch.from_numpy(each) for each in made_up(predictor.encoder.layout, _EXAMPLE_ROWS))
    file = folder / PROGRAMS[to]
    if to == "onnx":
        labels = predictor.config.log_schema.labels
        rates = [label.negative_sampling_rate for label in labels]
        whole = Whole(body, plan, weights, model.tasks, predictor.calibrators, rates)
        _write_onnx(whole.eval(), ids, dense, file, predictor)
        return None
    for each, weight in zip(plan, weights, strict=True):
        write_table(weight, folder / "tables" / each.file, each.kind)
    rows = [each.to(device) for each in Tables(table_files(folder / "tables"), plan).look_up(ids)]
    try:
        body(ids.to(device), dense.to(device), rows)
    except RuntimeError as error:
        if dtype == "fp32":
            raise
        name = predictor.config.model.interaction["name"]
        raise UserError(f"--dtype bf16: {name} works in fp32 in part ({error}); export it in fp32") from None
    program = _exported(body, ids.to(device), dense.to(device), rows)
    division = divided(predictor.config.log_schema, predictor.encoder.layout, plan)
    over_requests = None
    if division is not None:
        first, own = (Tables(table_files(folder / "tables"), each) for each in (division.first, division.own))
        over_requests = per_request(program, division, first, own, (ids, dense), device)
    if to == "aoti":
        program = merged(program, ids.to(device), dense.to(device), rows)
    _save(program, to, file)
    if division is None or over_requests is None:
        return None
    _save(over_requests, to, folder / REQUESTS[to])
    return division.to_json()


def _save(program: torch.export.ExportedProgram, to: Target, file: Path) -> None:
    if to == "torch-export":
        save_portable(program, file)
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch._inductor.aoti_compile_and_package(program, package_path=str(file))


def _exported(body: Body, ids: Tensor, dense: Tensor, rows: list[Tensor]) -> torch.export.ExportedProgram:
    batch = torch.export.Dim("batch", min=1)
    shapes = {"ids": {0: batch}, "dense": {0: batch}, "rows": [{0: batch}] * len(rows)}
    with torch.no_grad():
        return torch.export.export(body, (ids, dense, rows), dynamic_shapes=shapes)


def _write_onnx(whole: Whole, ids: Tensor, dense: Tensor, file: Path, predictor: Predictor) -> None:
    try:
        import onnxscript  # noqa: F401
    except ImportError:
        raise UserError("--to onnx needs the packages of an extra; pip install 'mldcn[onnx]'") from None
    batch = torch.export.Dim("batch", min=1)
    noisy = logging.getLogger("torch.onnx")
    level = noisy.level
    noisy.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            made = torch.onnx.export(
                whole,
                (ids, dense),
                input_names=["ids", "dense"],
                output_names=["probabilities", "logits"],
                dynamic_shapes={"ids": {0: batch}, "dense": {0: batch}},
                opset_version=OPSET,
                dynamo=True,
                verbose=False,
            )
    except torch.onnx.errors.OnnxExporterError as error:
        name = predictor.config.model.interaction["name"]
        first = next(iter(str(error.__cause__ or error).splitlines()), "")
        raise UserError(
            f"--to onnx: {name} has no ONNX form ({first}); export to aoti or torch-export"
        ) from None
    finally:
        noisy.setLevel(level)
    assert made is not None
    made.model.metadata_props.update({"mldcn": __version__, "tasks": ",".join(predictor.tasks)})
    # A file of protocol buffers ends at 2 GB; larger tables lie beside it.
    made.save(str(file), external_data=sum(each.nbytes for each in whole.buffers()) > 1 << 30)
