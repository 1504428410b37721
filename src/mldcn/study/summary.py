"""A study's table: means over seeds, paired differences, and what they can and cannot show."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Any

from mldcn.metrics import non_inferior, paired_t
from mldcn.study.recipe import Recipe


@dataclass(frozen=True)
class Row:
    """One rival: its tuned settings and its metrics by seed."""

    rival: str
    interaction: dict[str, Any]
    settings: dict[str, Any]
    flops: int
    parameters: int
    seeds: list[int]
    test: list[dict[str, float]]
    valid: list[dict[str, float]]
    seconds: list[float]

    def values(self, metric: str) -> list[float]:
        """The test metric by seed."""
        return [metrics[metric] for metrics in self.test]


def to_markdown(recipe: Recipe, rows: list[Row]) -> str:
    """The table, best mean test AUC first."""
    reference = next(row for row in rows if row.rival == recipe.reference)
    lines = [
        f"# {recipe.title}",
        "",
        f"| model | FLOPs | dense parameters | test AUC (mean ± sd of {len(recipe.seeds)} seeds) | "
        f"{recipe.reference} minus it [95 %] | log loss | verdict for {recipe.reference} | settings |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in sorted(rows, key=lambda row: -statistics.fmean(row.values("auc"))):
        auc = row.values("auc")
        spread = f" ± {statistics.stdev(auc):.5f}" if len(auc) > 1 else ""
        difference, verdict = _against(recipe, reference, row)
        settings = ", ".join(f"{key.rpartition('.')[2]} {value}" for key, value in row.settings.items())
        lines.append(
            f"| {row.rival} | {row.flops:,} | {row.parameters:,} | {statistics.fmean(auc):.5f}{spread} | "
            f"{difference} | {statistics.fmean(row.values('logloss')):.5f} | {verdict} | {settings} |"
        )
    lines += [
        "",
        f"Every model was tried with the same {len(recipe.trials())} settings on seed {recipe.seeds[0]}; the "
        f"one with the best validation metric was trained with seeds {', '.join(map(str, recipe.seeds))}, and "
        "test metrics chose nothing. Differences: paired t over seeds, so they hold the noise "
        f"of training and not that of the test rows. Margin of no worse: {recipe.margin}.",
        "",
    ]
    return "\n".join(lines)


def _against(recipe: Recipe, reference: Row, row: Row) -> tuple[str, str]:
    if row is reference:
        return "–", "–"
    mine, theirs = reference.values("auc"), row.values("auc")
    if len(mine) < 2:
        return f"{mine[0] - theirs[0]:+.5f}", "one seed: inconclusive"
    difference = paired_t(theirs, mine)
    text = f"{difference.delta:+.5f} [{difference.low:+.5f}, {difference.high:+.5f}]"
    if difference.better == "b":
        return text, "better"
    if difference.better == "a":
        return text, "worse"
    return text, "no worse" if non_inferior(difference, recipe.margin) else "inconclusive"
