"""``Engine``: raw values in, probabilities and a ranking out, from a run's folder or an exported bundle.

An engine computes what ``mldcn predict`` does for the same rows of a log, texts that mean a missing value
(``data.missing``) included. It may be called by several threads at once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray

from mldcn.config import Config
from mldcn.data.encoder import Encoder
from mldcn.errors import UserError
from mldcn.metrics import Isotonic, Platt
from mldcn.model import Ranker
from mldcn.predict import Predictor, calibrated, unsampled
from mldcn.run import VERSIONED, RunFolder
from mldcn.serving.encoding import Rows
from mldcn.serving.halves import halves
from mldcn.serving.raw import RawEncoder
from mldcn.serving.remote import RemoteTables, TableServer
from mldcn.serving.sample import sample_request
from mldcn.serving.values import Input


class Program(Protocol):
    """Encoded rows to logits, the position's term at the serving position included."""

    def __call__(
        self,
        ids: NDArray[np.int32],
        dense: NDArray[np.float32],
        request: NDArray[np.int64] | None = None,
    ) -> NDArray[np.float32]:
        """Logits ``(N, T)``.

        Args:
            ids: ``(N, C)``.
            dense: ``(N, D)``.
            request: ``(N,)``: rows of one number follow one another and agree in the features of user and
                context; the first is 0, the next 1 and so on. None where that is not known.
        """


@runtime_checkable
class TwoSteps(Protocol):
    """A program whose look-ups are a step of their own: it gives ``compute(look_up(...))``."""

    def look_up(
        self,
        ids: NDArray[np.int32],
        dense: NDArray[np.float32],
        request: NDArray[np.int64] | None = None,
    ) -> Any:
        """The first step, of the same arguments as :class:`Program`."""
        ...

    def compute(self, found: Any) -> NDArray[np.float32]:
        """The second step."""
        ...


@dataclass(frozen=True)
class Scores:
    """The answer to one call.

    Attributes:
        probabilities: ``(n, T)`` float32, calibrated and corrected for sampled negatives as the run's config says.
        unseen: ids that training did not see, counted by feature.
        missing: missing values, counted by feature.
    """

    probabilities: NDArray[np.float32]
    unseen: dict[str, int] = field(default_factory=dict)
    missing: dict[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.probabilities)


class Engine:
    """A model with its preprocessing, ready to answer.

    Args:
        name: the model's.
        version: tells its content apart.
        config: of the run.
        encoder: from raw values to encoded rows.
        calibrators: of the tasks that have one.
        program: from encoded rows to logits.
        sample: a request, the probabilities of its answer and how far others may lie apart.
        remote: its tables, where they lie on another machine.
    """

    def __init__(
        self,
        name: str,
        version: str,
        config: Config,
        encoder: Encoder,
        calibrators: Mapping[str, Platt | Isotonic],
        program: Program,
        sample: dict[str, Any] | None = None,
        remote: RemoteTables | None = None,
    ) -> None:
        self.name = name
        self.version = version
        self.config = config
        self.encoder = encoder
        self._calibrators = dict(calibrators)
        self.program = program
        self.remote = remote
        self._sample = sample
        names = {feature.name for feature in encoder.schema.features}
        self._raw = RawEncoder(encoder, names, config.data.missing)
        self._columns = self._raw.columns
        self._halves = halves(self._raw)
        self._rates = [label.negative_sampling_rate for label in config.log_schema.labels]

    @classmethod
    def load(cls, path: str | Path, device: str = "auto", tables: TableServer | None = None) -> Engine:
        """Opens a finished run's folder or a bundle's and checks it.

        Args:
            path: the folder.
            device: where to compute.
            tables: a server that holds the tables of the bundle.

        Raises:
            UserError: the folder is neither, or is damaged, unfinished or of another version.
        """
        path = Path(path)
        if (path / "bundle.json").is_file():
            from mldcn.serving.bundle import open_bundle

            return open_bundle(path, device, tables)
        if not (path / VERSIONED).is_file():
            raise UserError(f"{path}: is neither a run's folder nor a bundle; 'mldcn fit' makes the former")
        if tables is not None:
            raise UserError(f"{path}: a run has its tables in its model; --tables needs a bundle: export it")
        return cls.of_predictor(Predictor(RunFolder.open(path), device))

    @classmethod
    def of_predictor(cls, predictor: Predictor) -> Engine:
        """The engine of a run, computed by PyTorch operation by operation."""
        run = predictor.run
        return cls(
            run.path.resolve().name,
            content_version(run.path / "manifest.json"),
            predictor.config,
            predictor.encoder,
            predictor.calibrators,
            eager(predictor.model, predictor.device),
        )

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks' names, in the order of the probabilities."""
        return self.config.log_schema.tasks

    @property
    def inputs(self) -> tuple[Input, ...]:
        """The columns of raw values that a row has."""
        return self._columns.inputs

    @property
    def constant(self) -> frozenset[str]:
        """Names of the columns that are the same for all candidates of a request."""
        return self._columns.constant

    def score(self, columns: Mapping[str, Sequence[Any]]) -> Scores:
        """Scores rows of raw values.

        Args:
            columns: values by column: Python lists as from JSON, or Arrow arrays; all of one length, which may
                be 0. Columns that only the schema's labels, weight, position and so on read are passed over.

        Raises:
            UserError: a column is lacking or unknown, or a value is not what the schema says; names the row
                (the first is 1), the column and the remedy.
        """
        return self.score_rows([self.encode(columns)])[0]

    def rank(self, constant: Mapping[str, Any], candidates: Mapping[str, Sequence[Any]]) -> Scores:
        """Scores the candidates of one request.

        Args:
            constant: one value a column, those of user and context for example.
            candidates: values by column of all others, one a candidate.

        Raises:
            UserError: a column is in both or in neither, or as :meth:`score`.
        """
        return self.score_rows([self.encode_rank(constant, candidates)])[0]

    def encode(self, columns: Mapping[str, Sequence[Any]]) -> Rows:
        """The first half of :meth:`score`: what can be wrong with a call is found here.

        Raises:
            UserError: as :meth:`score`.
        """
        return self._raw.encode(columns)

    def encode_rank(self, constant: Mapping[str, Any], candidates: Mapping[str, Sequence[Any]]) -> Rows:
        """The first half of :meth:`rank`. What the request gives once is encoded once.

        Raises:
            UserError: as :meth:`rank`.
        """
        if self._halves is None or not self._halves[0].is_given(constant, candidates):
            return self.encode(self._columns.joined(constant, candidates))
        self._columns.check_sides(constant, candidates)
        self._columns.check_names([*constant, *candidates])
        once, each = self._halves
        shared = {column.name for column in once.columns.inputs} & constant.keys()
        read = {column.name for column in each.columns.inputs}
        first = once.encode({name: [constant[name]] for name in shared})
        repeated = {name: value for name, value in constant.items() if name in read}
        own = each.encode(each.columns.joined(repeated, candidates))
        count = len(own)
        ids = np.empty((count, self.encoder.layout.num_id_columns), np.int32)
        dense = np.empty((count, self.encoder.layout.num_dense_columns), np.float32)
        for half, rows in ((once, first), (each, own)):
            ids[:, half.ids] = rows.ids
            dense[:, half.dense] = rows.dense
        return Rows(
            ids,
            dense,
            own.unseen | {name: count * number for name, number in first.unseen.items()},
            own.missing | {name: count * number for name, number in first.missing.items()},
            request=True,
        )

    def score_rows(self, calls: Sequence[Rows]) -> list[Scores]:
        """The second half of :meth:`score`, for several calls in one batch."""
        return self.look_up(calls)()

    @property
    def two_steps(self) -> bool:
        """Whether :meth:`look_up` has something to do, which another batch's computation need not wait for."""
        return isinstance(self.program, TwoSteps)

    def look_up(self, calls: Sequence[Rows]) -> Callable[[], list[Scores]]:
        """The first step of :meth:`score_rows`; what it gives takes the second.

        Raises:
            Refused: the tables lie on another machine that does not answer.
        """
        several = len(calls) > 1
        ids = np.concatenate([call.ids for call in calls]) if several else calls[0].ids
        dense = np.concatenate([call.dense for call in calls]) if several else calls[0].dense
        request = None
        if any(call.request for call in calls):
            steps = [
                np.arange(len(call)) == 0 if call.request else np.ones(len(call), bool) for call in calls
            ]
            request = np.cumsum(np.concatenate(steps)) - 1
        work = self._begun(ids, dense, request)
        ends = np.cumsum([len(call) for call in calls])[:-1]

        def finish() -> list[Scores]:
            return [
                Scores(part, call.unseen, call.missing)
                for part, call in zip(np.split(work(), ends), calls, strict=True)
            ]

        return finish

    def sample(self) -> dict[str, Any]:
        """A request that works: ``{"constant": {...}, "candidates": {...}}``, as :meth:`rank` takes it."""
        if self._sample is not None:
            return dict(self._sample["request"])
        return sample_request(self.config.log_schema, self.encoder, self._columns)

    def check(self) -> None:
        """Scores the sample request.

        Raises:
            UserError: the answer holds no probabilities, or others than at export.
        """
        request = self.sample()
        found = self.rank(request["constant"], request["candidates"]).probabilities
        if not (np.isfinite(found).all() and (found >= 0).all() and (found <= 1).all()):
            raise UserError(
                f"{self.name}: its sample request gives no probabilities; train or export it again"
            )
        if self._sample is None:
            return
        apart = np.abs(found - np.array(self._sample["probabilities"], np.float32)).max()
        if not apart <= self._sample["tolerance"]:
            raise UserError(
                f"{self.name}: its sample request is answered otherwise than at export, by up to {apart:.2g}; "
                "export the run again"
            )

    def _begun(
        self, ids: NDArray[np.int32], dense: NDArray[np.float32], request: NDArray[np.int64] | None
    ) -> Callable[[], NDArray[np.float32]]:
        size = self.config.training.eval_batch_size
        parts = []
        for start in range(0, len(ids), size):
            part = slice(start, start + size)
            among = None if request is None else request[part] - request[start]
            parts.append(self._part(ids[part], dense[part], among))

        def finish() -> NDArray[np.float32]:
            found = [torch.sigmoid(torch.from_numpy(part())) for part in parts]
            scores = torch.cat(found).numpy() if found else np.zeros((0, len(self.tasks)), np.float32)
            return unsampled(calibrated(scores, self.tasks, self._calibrators), self._rates)

        return finish

    def _part(
        self, ids: NDArray[np.int32], dense: NDArray[np.float32], request: NDArray[np.int64] | None
    ) -> Callable[[], NDArray[np.float32]]:
        if isinstance(self.program, TwoSteps):
            return partial(self.program.compute, self.program.look_up(ids, dense, request))
        return partial(self.program, ids, dense, request)


def eager(model: Ranker, device: torch.device) -> Program:
    """A model as a program, computed by PyTorch operation by operation."""

    @torch.inference_mode()
    def program(
        ids: NDArray[np.int32], dense: NDArray[np.float32], request: NDArray[np.int64] | None = None
    ) -> NDArray[np.float32]:
        logits = model.relevance(torch.from_numpy(ids).to(device), torch.from_numpy(dense).to(device))
        if model.position_bias is not None:
            logits = logits + model.position_logit(None)
        numbers: NDArray[np.float32] = logits.float().cpu().numpy()
        return numbers

    return program


def content_version(manifest: Path) -> str:
    """A short hash of a manifest, and so of all whose checksums stand in it."""
    return hashlib.sha256(manifest.read_bytes()).hexdigest()[:12]
