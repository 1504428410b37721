"""From a batch to ``x0``: tables, pooling, sequences, normalisation."""

from mldcn.embedding.embedder import Embedder
from mldcn.embedding.sides import SideEmbedder

__all__ = ["Embedder", "SideEmbedder"]
