"""Who watches a run: the terminal, TensorBoard, MLflow. The loop tells them; they decide what to show."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mldcn.config import Config
from mldcn.errors import UserError
from mldcn.files import write_text
from mldcn.run import MLFLOW_RUN

Metrics = Mapping[str, Mapping[str, float]]  # task -> metric -> value


@dataclass(frozen=True)
class Progress:
    """Where a run stands. ``loss`` is the mean since the last report; the rate is that since the last
    evaluation or checkpoint.
    """

    step: int
    total_steps: int
    epoch: int
    loss: float
    lr: float
    rows_per_second: float


class Observer:
    """Told of everything that happens in a run; does nothing by itself."""

    def started(self, title: str, total_steps: int, step: int) -> None:
        """The loop begins at ``step`` of at most ``total_steps``."""

    def stepped(self, progress: Progress) -> None:
        """Some steps were made."""

    def evaluated(self, step: int, metrics: Metrics, *, best: bool) -> None:
        """The validation rows were scored."""

    def noted(self, text: str) -> None:
        """Something happened that a reader of the log should know, a roll-back for example."""

    def finished(self, metrics: Mapping[str, Metrics]) -> None:
        """The run is over; ``metrics`` is split -> task -> metric -> value."""

    def stopped(self) -> None:
        """The run ended before its time, by an error or because it was asked to."""


class TensorBoard(Observer):
    """Writes scalars for TensorBoard (extra ``tensorboard``)."""

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise UserError(
                "training.tensorboard needs the extra: pip install 'mldcn[tensorboard]'"
            ) from None
        self.writer: Any = SummaryWriter(str(folder))

    def stepped(self, progress: Progress) -> None:
        """Writes the loss, the learning rate and the speed."""
        for name in ("loss", "lr", "rows_per_second"):
            self.writer.add_scalar(f"train/{name}", getattr(progress, name), progress.step)

    def evaluated(self, step: int, metrics: Metrics, *, best: bool) -> None:
        """Writes the validation metrics."""
        for name, value in _flat(metrics):
            self.writer.add_scalar(f"valid/{name}", value, step)
        self.writer.flush()

    def finished(self, metrics: Mapping[str, Metrics]) -> None:
        """Closes the file."""
        self.writer.close()

    def stopped(self) -> None:
        """Closes the file."""
        self.writer.close()


class MLflow(Observer):
    """Logs to the MLflow server or folder that MLFLOW_TRACKING_URI names (extra ``mlflow``).

    Args:
        name: of MLflow's run.
        parameters: what it was made with.
        note: a file for the id of MLflow's run.
        resume: go on with the run that the file names, if there is one.
    """

    def __init__(self, name: str, parameters: Mapping[str, str], note: Path, *, resume: bool) -> None:
        try:
            import mlflow
        except ImportError:
            raise UserError("training.mlflow needs the extra: pip install 'mldcn[mlflow]'") from None
        self.mlflow: Any = mlflow
        if resume and note.is_file():
            self.run = mlflow.start_run(run_id=note.read_text(encoding="utf-8").strip())
            return
        self.run = mlflow.start_run(run_name=name)
        write_text(note, self.run.info.run_id + "\n")
        mlflow.log_params(dict(parameters))

    def stepped(self, progress: Progress) -> None:
        """Logs the loss."""
        self.mlflow.log_metric("train/loss", progress.loss, step=progress.step)

    def evaluated(self, step: int, metrics: Metrics, *, best: bool) -> None:
        """Logs the validation metrics."""
        self.mlflow.log_metrics({f"valid/{name}": value for name, value in _flat(metrics)}, step=step)

    def finished(self, metrics: Mapping[str, Metrics]) -> None:
        """Logs the final metrics and ends MLflow's run."""
        for split, of_tasks in metrics.items():
            self.mlflow.log_metrics({f"final/{split}/{name}": value for name, value in _flat(of_tasks)})
        self.mlflow.end_run()

    def stopped(self) -> None:
        """Ends MLflow's run as killed; a resumed run goes on with it."""
        self.mlflow.end_run(status="KILLED")


def trackers(config: Config, folder: Path, *, resume: bool) -> list[Observer]:
    """Those that a config asks for, for the run in a folder.

    Raises:
        UserError: its package is not installed.
    """
    found: list[Observer] = []
    if config.training.tensorboard:
        found.append(TensorBoard(folder / "tensorboard"))
    if config.training.mlflow:
        parameters = {"interaction": str(config.model.interaction["name"])}
        found.append(MLflow(folder.name, parameters, folder / MLFLOW_RUN, resume=resume))
    return found


def _flat(metrics: Metrics) -> Iterable[tuple[str, float]]:
    for task, values in metrics.items():
        for name, value in values.items():
            if value == value:  # trackers refuse NaN
                yield f"{task}/{name.replace('@', '_at_')}", value
