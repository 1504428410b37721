"""The shared look of HTML reports and plots; it knows nothing of what is reported.

``blocks`` and ``table`` are what a ``Page`` is built from, ``plots`` draws, ``comparison`` puts a training or
comparison report together from plain ``RunSummary`` numbers. Importing it costs no matplotlib.
"""

from mldcn.report.comparison import comparison_page, comparison_plots, run_page
from mldcn.report.page import Page
from mldcn.report.summary import Bins, Difference, FeatureSummary, RunSummary

__all__ = [
    "Bins",
    "Difference",
    "FeatureSummary",
    "Page",
    "RunSummary",
    "comparison_page",
    "comparison_plots",
    "run_page",
]
