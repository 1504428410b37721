"""Masked Low-Rank Deep & Cross Networks, and the ranking pipeline around them."""

from __future__ import annotations

import typing

__version__ = "0.1.0"

__all__ = ["CTRModel", "__version__"]

if typing.TYPE_CHECKING:
    from mldcn.estimator import CTRModel


def __getattr__(name: str) -> object:
    # Loaded when it is asked for, so that importing the package stays light.
    if name == "CTRModel":
        from mldcn.estimator import CTRModel

        return CTRModel
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
