"""Many models on one log at one cost, each tuned with the same effort, over several seeds."""

from mldcn.study.engine import run_study
from mldcn.study.recipe import Recipe, load_recipe
from mldcn.study.rows import RunRow, Study, load_study

__all__ = ["Recipe", "RunRow", "Study", "load_recipe", "load_study", "run_study"]
