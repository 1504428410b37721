"""Raw values become encoded rows: the short way where there is one, else the whole way."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from mldcn.data.encoder import Encoder
from mldcn.errors import UserError
from mldcn.serving.encoding import Part, Rows, missing_ids, places, unseen_ids
from mldcn.serving.shortcuts import Shortcut, Unusual, shortcut

FEW = 4096  # rows; of more than that the columns' own work is the greater part


class RawEncoder(Part):
    """A part that takes short ways, and remembers ids. Threads may share it.

    Args:
        encoder: of all features.
        features: the names of those that belong to the part.
        missing: texts that mean a missing value.
        shortcuts: of its features, where others use them already.
    """

    def __init__(
        self,
        encoder: Encoder,
        features: Collection[str],
        missing: Sequence[str],
        shortcuts: Mapping[str, Shortcut] | None = None,
    ) -> None:
        super().__init__(encoder, features, missing)
        own = self.encoder.schema.features
        self._shortcuts = {
            each.name: shortcuts[each.name] if shortcuts else shortcut(encoder, each, missing) for each in own
        }
        layout = self.encoder.layout
        names = self._shortcuts
        self._ids = {n: places([slot.columns for slot in layout.ids if slot.feature == n]) for n in names}
        self._dense = {n: places([slot.columns for slot in layout.dense if slot.feature == n]) for n in names}

    def of(self, features: Collection[str]) -> RawEncoder:
        """The encoder of some of these features, with the same memory."""
        return RawEncoder(self.encoder, features, self.missing, self._shortcuts)

    def encode(self, values: Mapping[str, Sequence[Any]]) -> Rows:
        """Encodes rows, as :meth:`Part.encode` does."""
        try:
            return self._quickly(values)
        except (Unusual, UserError, KeyError):
            return super().encode(values)  # names the row that is wrong, if one is

    def _quickly(self, values: Mapping[str, Sequence[Any]]) -> Rows:
        lengths = {len(each) for each in values.values()}
        if len(lengths) != 1 or max(lengths) > FEW:
            raise Unusual
        self.columns.check_names(values)
        (count,) = lengths
        ids = np.empty((count, self.encoder.layout.num_id_columns), np.int32)
        dense = np.empty((count, self.encoder.layout.num_dense_columns), np.float32)
        missing: dict[str, int] = {}
        for name, each in self._shortcuts.items():
            own_ids, own_dense, lacking = each.encode(values)
            if own_ids is not None:
                ids[:, self._ids[name]] = own_ids
            if own_dense is not None:
                dense[:, self._dense[name]] = own_dense
            if lacking is not None:
                missing[name] = lacking
        return Rows(ids, dense, unseen_ids(self.encoder, ids), missing_ids(self.encoder, ids) | missing)
