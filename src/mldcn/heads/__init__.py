"""From the shared part of a model to one logit a task."""

from mldcn.heads.task import TaskHeads

__all__ = ["TaskHeads"]
