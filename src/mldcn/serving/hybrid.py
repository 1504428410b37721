"""A bundle's program in two steps: look-ups in tables on the CPU, and the rest on the device that computes.

A server takes the first step of its next batch while the second of the one before is under way.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mldcn.serving.program import Tables
from mldcn.serving.transfer import Transfer

# Candidates more than requests from which on it pays to compute what requests share apart.
SHARED_FROM = 256

# Of mldcn.serving.program.Body or mldcn.serving.rewriting.PerRequest.
Function = Callable[..., Tensor]


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
        transfer: to the device that computes the rest; None where that is the CPU.
    """

    def __init__(
        self,
        function: Function,
        tables: Tables,
        per_request: PerRequestProgram | None,
        transfer: Transfer | None,
    ) -> None:
        self.function = function
        self.tables = tables
        self.per_request = per_request
        self.transfer = transfer

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
        """The first step, on the CPU. What it gives is on its way to the device already.

        Raises:
            Refused: the tables lie on another machine that does not answer.
        """
        shared = self.per_request
        packed = self.transfer is not None  # the device unpacks rows of fewer bytes
        given, numbers = torch.from_numpy(ids), torch.from_numpy(dense)
        if shared is None or request is None or len(ids) - (request[-1:] + 1).sum() < SHARED_FROM:
            return self._sent(self.function, (given, numbers, self.tables.look_up(given, packed=packed)))
        each = torch.from_numpy(request)
        first = torch.from_numpy(np.flatnonzero(np.diff(request, prepend=-1)))
        heads = given.index_select(0, first), numbers.index_select(0, first)
        rows = shared.first.look_up(heads[0], packed=packed), shared.own.look_up(given, packed=packed)
        return self._sent(shared.function, (heads, (given, numbers), *rows, each))

    @torch.inference_mode()
    def compute(self, found: LookedUp) -> NDArray[np.float32]:
        """The second step."""
        logits = found.function(*found.inputs())
        numbers: NDArray[np.float32] = logits.cpu().numpy()
        return numbers

    def _sent(self, function: Function, inputs: tuple[Any, ...]) -> LookedUp:
        return LookedUp(function, (lambda: inputs) if self.transfer is None else self.transfer.send(inputs))


@dataclass(frozen=True)
class LookedUp:
    """What the second step of a :class:`BundleProgram` needs of the first."""

    function: Function
    inputs: Callable[[], tuple[Any, ...]]  # once they are on the device
