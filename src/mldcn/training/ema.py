"""An exponential moving average of the weights whose cost per step does not depend on the tables' rows."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class WeightAverage:
    r"""``avg_t = d_t avg_{t-1} + (1 - d_t) w_t`` with ``d_t = min(decay, (1 + t) / (10 + t))``.

    The warm-up of ``d_t`` keeps short runs from averaging over their random start. A table's row that no
    batch touched has kept its weight w since step s, so that its average is
    ``w + (avg_s - w) * prod d_{s+1..t}``: rows are brought up to date when they are touched next, and all
    together before the average is read. DCN V2 (Section 7.1.3) evaluates with an average of decay 0.9999.

    Args:
        model: its floating-point parameters are averaged.
        decay: the d that is reached in the end.
        tables: the parameters whose gradients are row-sparse.
    """

    def __init__(self, model: nn.Module, decay: float, tables: Mapping[str, nn.Parameter]) -> None:
        self.decay = decay
        self.step = 0
        self.log_decay = 0.0  # sum of log d_t so far
        table_ids = {id(table) for table in tables.values()}
        self.dense = {n: p for n, p in model.named_parameters() if id(p) not in table_ids}
        self.tables = {n: p for n, p in model.named_parameters() if id(p) in table_ids}
        self.average = {
            name: parameter.detach().clone() for name, parameter in {**self.dense, **self.tables}.items()
        }
        self.row_log_decay = {
            name: torch.zeros(table.shape[0], dtype=torch.float64, device=table.device)
            for name, table in self.tables.items()
        }

    @torch.no_grad()
    def before_step(self, touched: Mapping[str, Tensor]) -> None:
        """Brings the rows that the next step will change up to date.

        Args:
            touched: parameter name -> row numbers.
        """
        for name, rows in touched.items():
            self._catch_up(name, rows)

    @torch.no_grad()
    def after_step(self, touched: Mapping[str, Tensor]) -> None:
        """Takes the step's new weights into the average."""
        self.step += 1
        decay = min(self.decay, (1 + self.step) / (10 + self.step))
        for name, parameter in self.dense.items():
            self.average[name].lerp_(parameter, 1 - decay)
        self.log_decay += math.log(decay)
        for name, rows in touched.items():
            self._catch_up(name, rows)

    def _catch_up(self, name: str, rows: Tensor | slice) -> None:
        table, average, seen = self.tables[name], self.average[name], self.row_log_decay[name]
        factor = torch.exp(self.log_decay - seen[rows]).to(table.dtype).unsqueeze(1)
        average[rows] = torch.lerp(table.detach()[rows], average[rows], factor)
        seen[rows] = self.log_decay

    @torch.no_grad()
    def sync(self) -> None:
        """Brings every row of every table up to date."""
        for name in self.tables:
            self._catch_up(name, slice(None))

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside the block the model holds the averaged weights."""
        self.sync()
        parameters = {**self.dense, **self.tables}
        raw = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        self._load(parameters, self.average)
        try:
            yield
        finally:
            self._load(parameters, raw)

    @staticmethod
    @torch.no_grad()
    def _load(parameters: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]) -> None:
        for name, parameter in parameters.items():
            parameter.copy_(values[name])

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs."""
        return {
            "step": self.step,
            "log_decay": self.log_decay,
            "average": self.average,
            "row_log_decay": self.row_log_decay,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""
        self.step, self.log_decay = int(state["step"]), float(state["log_decay"])
        for mine, theirs in ((self.average, state["average"]), (self.row_log_decay, state["row_log_decay"])):
            for name, tensor in mine.items():
                tensor.copy_(theirs[name])
