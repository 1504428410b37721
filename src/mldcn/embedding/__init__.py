"""From a batch to ``x0``: tables, pooling, sequences, normalisation."""

from mldcn.embedding.embedder import Embedder

__all__ = ["Embedder"]
