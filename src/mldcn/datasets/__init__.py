"""Named logs: public ones, read from their publishers' files, and the synthetic ``pinads``."""

from mldcn.datasets.registry import Dataset, dataset, fetch, list_datasets, prepare

__all__ = ["Dataset", "dataset", "fetch", "list_datasets", "prepare"]
