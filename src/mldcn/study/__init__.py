"""Many models on one log at one cost, each tuned with the same effort, over several seeds."""

from mldcn.study.engine import run_study
from mldcn.study.recipe import Recipe, load_recipe

__all__ = ["Recipe", "load_recipe", "run_study"]
