"""The main job's steps, each one a call of the command line: train, evaluate, compare, fetch."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mldcn import interactions
from mldcn.comparison import Comparison, compare_predictions, prediction_chunks, read_predictions
from mldcn.config import Config, dump_config, load_config, parse
from mldcn.data.batch import EncodedLayout
from mldcn.data.encoder import Encoder
from mldcn.data.pipeline import give_memory_back
from mldcn.data.prepare import REJECTS, EncodedData, prepare
from mldcn.data.rejects import RejectsFile
from mldcn.data.shards import EncodedRows
from mldcn.embedding.embedder import table_widths
from mldcn.errors import UserError
from mldcn.explain import Explanation, explanation_page
from mldcn.explain import explain as explain_rows
from mldcn.files import locked, scratch, write_text
from mldcn.metrics import Difference, auc_intervals
from mldcn.model import pick_device
from mldcn.predict import Predictor, encode_log
from mldcn.report import Bins, FeatureSummary, RunSummary, run_page
from mldcn.report import Difference as ShownDifference
from mldcn.run import RunFolder
from mldcn.schema import EmbeddingFeature, TableFeature
from mldcn.training.checkpoint import noted
from mldcn.training.evaluate import Evaluation, evaluate
from mldcn.training.fit import Summary, fit
from mldcn.training.history import evaluations
from mldcn.training.identity import check_same, monitored
from mldcn.training.observers import Observer
from mldcn.training.recovery import Trouble
from mldcn.training.warm_start import WarmStart

Encoding = Callable[[str, int, int, int], None]

REPORT = "report.html"


def check(config: Config, warm_start: WarmStart | None = None) -> None:
    """Refuses what only shows when a model is built, before a long encoding starts.

    Args:
        config: the whole config.
        warm_start: the run to begin with.

    Raises:
        UserError: an interaction, option, task, metric or device is not known or not there.
    """
    interactions.parse(config.model.interaction)
    monitored(config)
    pick_device(config.training.device)
    if warm_start is not None:
        warm_start.adapt(config)


def encoded_folder(config: Config, run: Path, warm_start: WarmStart | None = None) -> Path:
    """Where a config's encoded rows lie: beside the run, shared by runs with the same data and schema.

    Rows encoded with another run's vocabularies have a folder of their own.
    """
    if config.data.encoded is not None:
        return Path(config.data.encoded)
    data = config.data.model_dump(mode="json", exclude={"encoded", "memory_mb"})
    base = [warm_start.checksum(), warm_start.statistics] if warm_start is not None else []
    key = json.dumps([data, config.log_schema.model_dump(mode="json"), *base])
    return run.parent / "encoded" / hashlib.blake2b(key.encode(), digest_size=6).hexdigest()


def encode(
    config: Config, folder: Path | None = None, encoding: Encoding | None = None
) -> tuple[Path, EncodedData]:
    """Encodes the log, or takes the encoded rows that are there; by default where a run in ``runs`` has them."""
    folder = folder or encoded_folder(config, Path("runs") / "any")
    return folder, prepare(config, folder, encoding)


def train(
    config: Config,
    run: RunFolder,
    *,
    resume: bool = False,
    overwrite: bool = False,
    warm_start: WarmStart | None = None,
    encoding: Encoding | None = None,
    observers: Sequence[Observer] = (),
) -> Summary:
    """Encodes the log (or takes the encoded rows that are there), trains, and writes the run's report.

    Args:
        config: the whole config.
        run: where the run is to be, or the folder of one that was interrupted, at whatever moment.
        resume: go on with the interrupted run; it knows itself what it was started from.
        overwrite: replace a run that is there, once the log has been read and encoded.
        warm_start: the finished run to begin with.
        encoding: told of the encoding's progress.
        observers: told of the training's.

    Raises:
        UserError: the log, the config or the run to start from do not go together, or another process writes
            the run.
    """
    with locked(run.path):
        if resume and "warm_start" in run.info():
            warm_start = WarmStart.reopen(run.info()["warm_start"])
        if warm_start is not None:
            if warm_start.run.path.resolve() == run.path.resolve():
                raise UserError(f"{run.path}: is the run to start from; name another folder with --out")
            config = warm_start.adapt(config)
        notes = {"warm_start": warm_start.note()} if warm_start is not None else {}
        if not resume:
            run.check_room(overwrite=overwrite)
        replaces = overwrite and run.path.exists()
        if not resume and not replaces:
            run = RunFolder.create(run.path, dump_config(config), notes)
        if resume and (then := noted(run.checkpoints, "config")) is not None:
            check_same(then, config, run.config)  # before its mistakes are looked for in the log
        folder = encoded_folder(config, run.path, warm_start)
        if warm_start is None:
            data = prepare(config, folder, encoding)
        else:
            base, statistics = warm_start.encoder(), warm_start.statistics
            data = prepare(config, folder, encoding, base=base, statistics=statistics)
        if data.rejected:
            for observer in observers:
                observer.noted(f"{data.rejected:,} bad rows are left out; {folder / REJECTS} names each")
        if replaces:
            run = RunFolder.create(run.path, dump_config(config), notes, overwrite=True)
        summary = fit(config, run, data, resume=resume, warm_start=warm_start, observers=observers)
        write_report(run)
    return summary


def complete(run: RunFolder) -> bool:
    """Does what a finished run lacks because it was killed at its very end; says whether it lacked anything."""
    with locked(run.path):
        lacked = run.checkpoints.exists() or not (run.path / REPORT).exists()
        if lacked:
            shutil.rmtree(run.checkpoints, ignore_errors=True)
            write_report(run)
    return lacked


def run_summary(name: str, run: RunFolder, differences: Mapping[str, Difference] | None = None) -> RunSummary:
    """What a report shows of a finished run; ``differences`` in AUC to a reference run, by task."""
    info, metrics = run.info(), run.read_json("metrics.json")
    config = load_config(run.config)
    name_only = {"name": config.model.interaction["name"]}
    usual = interactions.parse(name_only).model_dump(mode="json")
    options = {k: v for k, v in config.model.interaction.items() if v != usual.get(k)}
    reliability = run.read_json("reliability.json") if (run.path / "reliability.json").exists() else {}
    intervals = _auc_intervals(run) if run.predictions.exists() else {}
    return RunSummary(
        name=name,
        intervals=intervals,
        metrics=metrics.get("test", {}),
        valid_metrics=metrics.get("valid", {}),
        options=", ".join(f"{key} {value}" for key, value in options.items()),
        flops=sum(info["flops"].values()),
        dense_params=info["parameters"]["dense"],
        embedding_params=info["parameters"]["embedding"],
        seconds=info["train_seconds"],
        rows_per_second=info["rows_per_second"],
        history=evaluations(run.history),
        reliability={task: Bins(**bins) for task, bins in reliability.items()},
        differences={
            task: ShownDifference(d.delta, d.low, d.high, d.p_value)
            for task, d in (differences or {}).items()
        },
        config=run.config.read_text(encoding="utf-8"),
    )


def _auc_intervals(run: RunFolder) -> dict[str, tuple[float, float]]:
    """Each task's interval of the test AUC."""
    tasks, chunks = prediction_chunks(run.predictions)
    with scratch("report") as folder:
        return auc_intervals(chunks, tasks, folder)


def _features(run: RunFolder, config: Config) -> list[FeatureSummary]:
    """Each feature, the rows of its table and its columns of x0."""
    layout = EncodedLayout.from_json(run.read_json("layout.json"))
    widths = table_widths(layout, config.log_schema, config.model.embedding)
    found = []
    for feature in config.log_schema.features:
        table = config.log_schema.table_of(feature) if isinstance(feature, TableFeature) else None
        dense = sum(slot.width for slot in layout.dense if slot.feature == feature.name)
        projected = feature.project_to if isinstance(feature, EmbeddingFeature) else None
        found.append(
            FeatureSummary(
                name=feature.name,
                kind=feature.kind,
                source=feature.source,
                rows=layout.tables[table] if table is not None else None,
                width=widths[table] if table is not None else projected or dense,
            )
        )
    return found


def write_report(run: RunFolder) -> None:
    """Writes a finished run's page."""
    info = run.info()
    rows = ", ".join(f"{split} {count:,}" for split, count in info["rows"].items())
    which = "the best on validation" if "valid" in info["rows"] else "the last, since no rows validate"
    waited = f"Training waited for data {info['data_wait_share']:.1%} of its time."
    page = run_page(
        f"Run {run.path.name}",
        run_summary(run.path.name, run),
        protocol=f"Rows: {rows}. The weights are those of step {info['best_step']}, {which}. {waited}"
        + _troubles(info),
        features=_features(run, load_config(run.config)),
        next_steps=[
            ("Score new rows", f"mldcn predict {run.path} NEW_LOG --out scores.csv"),
            ("Compare with another run", f"mldcn compare {run.path} ANOTHER_RUN"),
        ],
    )
    page.write(run.path / REPORT)


def _troubles(info: Mapping[str, Any]) -> str:
    """Sentences on the roll-backs of a run."""
    found = [str(Trouble.from_json(raw)) for raw in info.get("troubles", [])]
    if not found:
        return ""
    return (
        f" Training was rolled back, slowed down and led past a batch {len(found)} times: {'. '.join(found)}."
    )


def evaluate_log(
    run: RunFolder, files: Sequence[str], encoding: Encoding | None = None, rejects: RejectsFile | None = None
) -> Evaluation:
    """A finished run's metrics on another log with labels.

    Args:
        run: the run; its config says how the log is read.
        files: the log.
        encoding: told of the progress.
        rejects: given the bad rows, where the run's config says ``data.on_error: skip``.

    Raises:
        UserError: the log cannot be read, or all its rows are bad.
    """
    with scratch("evaluate") as folder:
        return _evaluate(run, files, folder, encoding, rejects or RejectsFile(None))


def _evaluate(
    run: RunFolder, files: Sequence[str], folder: Path, encoding: Encoding | None, rejects: RejectsFile
) -> Evaluation:
    predictor = Predictor(run)
    rows = encode_log(predictor, files, folder / "encoded", encoding, rejects)
    # Some 80 MB that reading the log has used and scoring does not.
    give_memory_back()
    return evaluate(
        predictor.model,
        rows,
        predictor.config,
        device=predictor.device,
        predictions=folder / "predictions.arrow",
        calibrators=predictor.calibrators,
    )


def compare(
    a: Path, b: Path, files: Sequence[str] = (), *, repeats: int = 1000, rejects: RejectsFile | None = None
) -> Comparison:
    """The difference of two finished runs on their common test rows, or on another log.

    Args:
        a: a run's folder.
        b: another one's.
        files: the other log.
        repeats: bootstrap samples.
        rejects: given the other log's bad rows, where the first run's config says ``data.on_error: skip``.

    Raises:
        UserError: the runs were not tested on the same rows.
    """
    runs = [RunFolder.open(path) for path in (a, b)]
    if not files:
        tables = [read_predictions(run.predictions) for run in runs]
        return compare_predictions(tables[0], tables[1], (str(a), str(b)), repeats=repeats)
    with scratch("compare") as home:
        tables = []
        for i, run in enumerate(runs):
            folder = home / str(i)
            bad = rejects if rejects is not None and i == 0 else RejectsFile(None)
            _evaluate(run, files, folder, None, bad)
            tables.append(read_predictions(folder / "predictions.arrow"))
        return compare_predictions(tables[0], tables[1], (str(a), str(b)), repeats=repeats)


def explain(
    run: RunFolder,
    files: Sequence[str] = (),
    *,
    row: int = 0,
    out: Path | None = None,
    encoding: Encoding | None = None,
    rejects: RejectsFile | None = None,
) -> tuple[Explanation, Path]:
    """Looks at what a finished run learned, and writes a page, its tables and pictures, and all of it as JSON.

    Args:
        run: the run.
        files: a log with labels to look with; by default the run's own test rows.
        row: the number, from 0 on, of the row whose masks are shown.
        out: folder; ``explain`` in the run's by default.
        encoding: told of the progress.
        rejects: given the log's bad rows, where the run's config says ``data.on_error: skip``.

    Returns:
        What was found, and the page.

    Raises:
        UserError: the run's encoded test rows are gone, or there is no such row.
    """
    predictor = Predictor(run)
    folder = out or run.path / "explain"
    with scratch("explain") as home:
        if files:
            bad = rejects or RejectsFile(None)
            rows, where = encode_log(predictor, files, home / "encoded", encoding, bad), "another log"
        else:
            rows, where = _test_rows(predictor), "the run's test rows"
        found = explain_rows(predictor, rows, where, row=row, progress=encoding)
    page = explanation_page(found)
    folder.mkdir(parents=True, exist_ok=True)
    page.write_files(folder, "explain")
    write_text(folder / "explain.json", json.dumps(found.to_json(), indent=1, ensure_ascii=False) + "\n")
    return found, page.write(folder / "explain.html")


def _test_rows(predictor: Predictor) -> EncodedRows:
    """A run's test rows, as they were encoded when it was trained.

    Raises:
        UserError: they are not there, or are no longer those that the run was tested on.
    """
    run = predictor.run
    noted = run.info().get("warm_start")
    remedy = "name a log with labels with --log"
    try:
        start = WarmStart.reopen(noted) if noted is not None else None
        folder = encoded_folder(predictor.config, run.path, start)
    except UserError as error:
        raise UserError(f"{run.path}: its test rows are not to be found ({error}); {remedy}") from None
    if not folder.is_dir():
        raise UserError(f"{folder}: the run's encoded rows are gone; {remedy}")
    if "test" not in run.info()["rows"] or not (folder / "test").is_dir():
        raise UserError(f"{run.path}: the run has no test rows; {remedy}")
    if Encoder.load(folder / "encoder").checksum() != predictor.encoder.checksum():
        raise UserError(f"{folder}: holds rows of another encoding than the run's; {remedy}")
    return EncodedRows(folder / "test")


def fetch(name: str, out: Path, source: Path | None, rows: int | None = None) -> Path:
    """Fetches a named log (or takes the user's download) and writes its config; gives the config's path."""
    from mldcn import datasets
    from mldcn.datasets.pinads import write_log

    if name == "pinads" and rows is not None:
        write_log(out / name, rows)
        path: Path | None = out / name
    else:
        path = source if source is not None else datasets.fetch(name, out / "download")
    _, raw = datasets.prepare(name, path, out / name)
    config = parse(Config, raw, name)
    target = out / f"{name}.yaml"
    write_text(target, dump_config(config))
    load_config(target)
    return target
