"""What a model may cost and has to bring, as a recipe says it."""

from __future__ import annotations

from pydantic import Field, model_validator

from mldcn.schema import Strict


class Limits(Strict):
    """Limits of the constraints table. What has none is measured and shown all the same.

    With any of them set, the study also times each model against the baseline in turns.
    """

    gain: dict[str, float] = Field(
        {},
        description="metric, or task/metric -> the least gain on the baseline; -0.001 allows such a loss",
    )
    device_memory_gb: float | None = Field(None, gt=0, description="GiB of the device that would train it")
    memory_percent: float | None = Field(
        None, gt=0, description="the most of that device at the peak of a training step"
    )
    latency_percent: float | None = Field(
        None, description="the most that scoring a batch may take longer than with the baseline"
    )
    latency_batch: int | None = Field(
        None, ge=1, description="rows in that batch; by default the largest of latency_batches"
    )
    hyperparameters: int | None = Field(None, ge=0, description="the most that may be set or tuned")
    deviation: dict[str, float] = Field(
        {}, description="metric, or task/metric -> the largest standard deviation over seeds"
    )
    disagreement_percent: float | None = Field(
        None, gt=0, description="the most of mean |p_a - p_b| over pairs of copies, of the mean prediction"
    )
    broken_runs: int | None = Field(None, ge=0, description="the most final runs that may break down")
    roll_backs: int | None = Field(None, ge=0, description="the most roll-backs of all final runs together")
    parts: int | None = Field(
        None,
        ge=2,
        description="parts that the test rows are cut into, in the log's order: the AUC gain is told in each",
    )
    part_gain: float | None = Field(None, description="the least AUC gain in any of these parts")
    stress: tuple[str, ...] = Field(
        (), description="budgets that are there for their hardship (lr x10): they have no row of their own"
    )
    stress_broken_runs: int | None = Field(
        None, ge=0, description="the most runs that may break down at those"
    )

    @model_validator(mode="after")
    def _measurable(self) -> Limits:
        if self.memory_percent is not None and self.device_memory_gb is None:
            raise ValueError("memory_percent goes with device_memory_gb: of which device?")
        if self.part_gain is not None and self.parts is None:
            raise ValueError("part_gain goes with parts: how many?")
        if self.stress_broken_runs is not None and not self.stress:
            raise ValueError("stress_broken_runs goes with stress: at which budgets?")
        return self

    @property
    def asked(self) -> bool:
        """Whether a recipe asks for the constraints table."""
        return self != Limits()
