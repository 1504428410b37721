"""What a run learned: which fields it crosses, how its masks behave, which features it lives on."""

from mldcn.explain.explanation import Explanation, explain
from mldcn.explain.page import explanation_page

__all__ = ["Explanation", "explain", "explanation_page"]
