"""What a comparison says in words: only what its intervals bear out."""

from __future__ import annotations

from collections.abc import Sequence

from mldcn.report.blocks import Callout
from mldcn.report.summary import RunSummary
from mldcn.report.text import known, number, percent

AUC = "auc"


def verdict(run: RunSummary, task: str, reference: str) -> str | None:
    """What a run's interval says of its difference to the reference."""
    difference = run.differences.get(task)
    if difference is None:
        return "reference" if reference and run.name == reference else None
    return difference.verdict


def finding(runs: Sequence[RunSummary], reference: str, tasks: Sequence[str], level: float) -> Callout:
    """The comparison in a few sentences: who is first on the main task, and which differences are shown."""
    task = tasks[0]
    measured = [(value, run) for run in runs if known(value := run.metric(task, AUC)) and value is not None]
    if not measured:
        return Callout("No model has a test AUC", f"Nothing was measured on {task}.", "warning")
    best, first = max(measured, key=lambda pair: pair[0])
    if len(measured) == 1:
        return Callout(
            f"{first.name}: test AUC {number(best, '.4f')}", "One model was measured: nothing is compared."
        )
    title = f"{first.name} has the highest test AUC{_on(task, tasks)}: {number(best, '.4f')}"
    return Callout(title, " ".join(_sentences(runs, first, reference, task, level)))


def reading(
    runs: Sequence[RunSummary], reference: str, tasks: Sequence[str], level: float, attainable: bool
) -> list[str]:
    """How to read the comparison, as far as it has what is explained."""
    lines = [
        "AUC is the chance that a random positive row is ranked above a random negative one; 0.5 is guessing."
    ]
    compared = sum(bool(run.differences) for run in runs)
    if compared:
        lines.append(
            f"“No difference shown” means that the {percent(level)} interval of the difference contains zero: "
            "these test rows cannot tell the two models apart. It does not mean that they are equal."
        )
        lines.append(
            "An interval says how far another draw of test rows could move the number. Unless the protocol says "
            "so, it does not hold what another training seed would change."
        )
    if compared > 1:
        lines.append(
            f"The p-values and intervals are of one comparison each. Of many comparisons between equal "
            f"models, about one in {round(1 / (1 - level))} would show a difference by chance."
        )
    if len(runs) > 2:
        lines.append(
            "The model with the highest number was picked by that number, which flatters it a little: of equal "
            "models one is always first."
        )
    if any(known(run.flops) for run in runs):
        lines.append(
            "FLOPs are those of one example through the whole model; looking up an embedding row costs none."
        )
    if attainable:
        lines.append(
            "This log's true probabilities are known. The attainable AUC is theirs: on these rows a model can "
            "pass it only by chance."
        )
    return lines


def _sentences(
    runs: Sequence[RunSummary], first: RunSummary, reference: str, task: str, level: float
) -> list[str]:
    other = reference or "the reference"
    compared = [run for run in runs if task in run.differences]
    sentences = []
    if first in compared:
        d = first.differences[task]
        span = f"{percent(level)} interval {number(d.low, '+.4f')} to {number(d.high, '+.4f')}"
        ends = {
            "higher": "it is shown to be higher",
            "lower": "it is shown to be lower",
            "no difference shown": "the interval contains zero, so no difference is shown",
            "not known": "nothing is shown",
        }
        sentences.append(
            f"Its difference to {other} is {number(d.delta, '+.4f')} ({span}): {ends[d.verdict]}."
        )
    elif compared:
        sentences.append("It is the reference of the differences.")
    for kind, start in (
        ("higher", f"Shown to be higher than {other}"),
        ("lower", f"Shown to be lower than {other}"),
        ("no difference shown", f"No difference to {other} shown"),
    ):
        names = [run.name for run in compared if run is not first and run.differences[task].verdict == kind]
        if names:
            sentences.append(f"{start}: {', '.join(names)}.")
    if not compared:
        sentences.append("No differences were tested: a higher number may be chance.")
    return sentences


def _on(task: str, tasks: Sequence[str]) -> str:
    return f" on {task}" if len(tasks) > 1 else ""
