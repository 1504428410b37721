"""The report of a study: a page that stands alone, also as Markdown, its tables as CSV and its plots as files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import yaml

from mldcn.report import Page, plots
from mldcn.report.blocks import (
    Block,
    Bullets,
    Callout,
    Code,
    Details,
    Heading,
    KeyValues,
    Paragraph,
)
from mldcn.report.table import Table
from mldcn.report.text import number
from mldcn.run import RunFolder
from mldcn.study.accounts import calibration_table, constraints_table, cost_table, effort_table, runs_table
from mldcn.study.constraints import judge
from mldcn.study.findings import Summary
from mldcn.study.outline import Outline, metric_title
from mldcn.study.pictures import (
    Picture,
    ablation_pictures,
    calibration_pictures,
    cost_pictures,
    curve_pictures,
    first_shown,
    gain_pictures,
    quoted_pictures,
    shown,
)
from mldcn.study.quoted import read_quoted
from mldcn.study.rows import RunRow, Study
from mldcn.study.statistics import summarise
from mldcn.study.tables import (
    ablation_table,
    beaten_table,
    front_table,
    gains_table,
    matched_table,
    one_seed_table,
    pair_tables,
    power_table,
    quoted_table,
    scaling_table,
    steps_table,
)
from mldcn.study.wording import NOTES, finding, reading, unfinished

FOLDER, NAME = "report", "study"
_CONFIGS = "Configs"
_MADE = {".csv", ".svg", ".png"}


def write_report(study: Study) -> Path:
    """Writes the report into the study's folder ``report``, as far as the study has come.

    Returns:
        The page.
    """
    return StudyReport(study, summarise(study)).write(study.out / FOLDER)


class StudyReport:
    """A study's page and pictures.

    Args:
        study: finished or not.
        summary: what it shows.
    """

    def __init__(self, study: Study, summary: Summary) -> None:
        self.study, self.outline = study, Outline(study, summary)
        self.quoted = read_quoted(study.recipe.quoted)
        self.pictures: list[Picture] = []

    def write(self, folder: Path) -> Path:
        """Writes ``study.html``, ``study.md``, a CSV a table, an SVG and a PNG a plot; what is no more goes."""
        page = self.page()
        path = page.write(folder / f"{NAME}.html")
        # Configs would make up most of the Markdown; its table of runs names the folders that hold them.
        ends = [
            i for i, block in enumerate(page.blocks) if isinstance(block, Heading) and block.text == _CONFIGS
        ]
        page.blocks = page.blocks[: ends[-1] if ends else None]
        written = {path, *page.write_files(folder, NAME)}
        written |= {plots.save(picture.plot, folder / f"{picture.name}.png") for picture in self.pictures}
        for old in folder.iterdir():
            if old.suffix in _MADE and old not in written:
                old.unlink()
        return path

    def page(self) -> Page:
        """The page, all its sections in their order."""
        recipe, facts = self.study.recipe, self.study.facts
        self.pictures = []
        final = len(self.study.final)
        page = Page(
            recipe.title,
            subtitle=f"{len(recipe.rivals)} rivals, {final} final runs, {len(self.study.rows) - final} trials, "
            f"task {facts.task}",
            footer=f"Made by mldcn {facts.versions.get('mldcn', '')} from the study's rows.".replace(
                "  ", " "
            ),
        )
        page.add(finding(self.outline))
        warning = unfinished(self.outline)
        page.add(*([warning] if warning else []))
        for title, blocks in self._sections():
            page.add(*([Heading(title), *blocks] if blocks else []))
        return page

    def _sections(self) -> Iterator[tuple[str, list[Block]]]:
        if self.outline.there:
            yield (
                "Gains by setting" if self.outline.settings else "Gains against cost",
                self._drawn(gain_pictures(self.outline)),
            )
            yield "Gains", self._gains()
            yield "Rivals against each other", self._pairs()
            slopes = [*_tables(scaling_table(self.outline)), *_details(steps_table(self.outline))]
            yield "Slopes and saturation", slopes
            best = [*_tables(front_table(self.outline)), *_details(matched_table(self.outline))]
            yield "Best for their cost", best
            yield "Ablations" if self.study.recipe.vary else "Beside the paper", self._ablations()
            yield "Constraints", self._constraints()
            yield "Learning curves", self._folded(curve_pictures(self.outline))
            yield "Cost", [*self._costs(), *_details(cost_table(self.outline))]
            yield "Calibration", self._calibration()
        yield "How to read this", [Bullets(reading(self.outline)), *self._notes()]
        yield "Protocol", self._protocol()
        yield "Effort", [effort_table(self.outline)]
        yield "Runs", list(self._runs())

    def _drawn(self, pictures: Sequence[Picture]) -> list[Block]:
        self.pictures += pictures
        return shown(pictures)

    def _folded(self, pictures: Sequence[Picture]) -> list[Block]:
        self.pictures += pictures
        return first_shown(pictures, self._others)

    @property
    def _others(self) -> str:
        if not self.study.recipe.budgets:
            return "The others"
        return "At the other settings" if self.outline.settings else "At the other budgets"

    def _gains(self) -> list[Block]:
        outline = self.outline
        first, *others = [power.metric for power in outline.summary.power] or [outline.summary.metric]
        blocks: list[Block] = [gains_table(outline, first)]
        if outline.summary.power:
            blocks.append(power_table(outline))
        blocks += [
            Details(f"The same by {metric_title(metric)}", [gains_table(outline, metric)])
            for metric in others
        ]
        return blocks

    def _pairs(self) -> list[Block]:
        blocks = _tables(beaten_table(self.outline))
        blocks += [Details(title, [table]) for title, table in pair_tables(self.outline)]
        return [*blocks, *_details(one_seed_table(self.outline))]

    def _ablations(self) -> list[Block]:
        blocks: list[Block] = []
        for key, pictures in ablation_pictures(self.outline, self.quoted):
            blocks += [*self._drawn(pictures), ablation_table(self.outline, key, self.quoted)]
        table = quoted_table(self.outline, self.quoted)
        pictures = quoted_pictures(self.outline, self.quoted) if table is not None else []
        return [*blocks, *self._drawn(pictures), *_tables(table)]

    def _constraints(self) -> list[Block]:
        verdicts = judge(self.study, self.outline.summary)
        if verdicts is None or not verdicts.rows:
            return []
        title = f"Recommended: {verdicts.recommendation}"
        return [Callout(title, verdicts.reason), constraints_table(verdicts)]

    def _costs(self) -> list[Block]:
        pictures = cost_pictures(self.outline)
        self.pictures += pictures
        others = [Details(self._others, shown(pictures[2:]))] if pictures[2:] else []
        return [*shown(pictures[:2]), *others]

    def _calibration(self) -> list[Block]:
        table = calibration_table(self.outline)
        return [*self._folded(calibration_pictures(self.outline)), *_details(table)]

    def _notes(self) -> list[Block]:
        notes = self.outline.summary.notes
        return [Details("Notes: what is missing, and why", [Bullets(notes)])] if len(notes) > NOTES else []

    def _protocol(self) -> list[Block]:
        recipe, facts = self.study.recipe, self.study.facts
        rows = ", ".join(f"{split} {count:,}" for split, count in facts.rows.items())
        log = ", ".join(f"{key} {value}" for key, value in facts.log.items())
        match = {"flops": "FLOPs", "parameters": "parameters", "latency": "latency"}.get(
            recipe.match, "nothing"
        )
        items = [
            ("Log", f"{facts.dataset}, {facts.features} features" + (f" ({log})" if log else "")),
            ("Rows", rows),
            ("Task", facts.task),
            (
                "Judged by",
                f"{facts.monitor} on the validation rows: early stopping, and the choice among trials",
            ),
            ("Matched", match if recipe.budgets else "nothing: every rival as it is"),
            ("Seeds", ", ".join(map(str, recipe.seeds))),
            ("A gain that matters", f"{recipe.margin:g} {self.outline.metric}"),
            (
                "Machine",
                f"{facts.machine}; {facts.device}, {facts.threads} threads a run, {facts.jobs} runs at a time",
            ),
            ("Versions", ", ".join(f"{name} {version}" for name, version in facts.versions.items())),
            ("Time", f"{number(facts.seconds, 'duration')} in all"),
        ]
        blocks: list[Block] = [KeyValues(items), Paragraph(_test_rows(self.study))]
        plain = recipe.model_dump(mode="json", by_alias=True, exclude_defaults=True)
        blocks.append(Details("The recipe", [Code(yaml.safe_dump(plain, sort_keys=False))]))
        return blocks

    def _runs(self) -> Iterator[Block]:
        """All runs, and the config of each at a click."""
        final = self.study.final
        trials = [row for row in self.study.rows if row.stage == "tune"]
        for what, rows in (("final run", final), ("trial", trials)):
            if rows:
                title = f"{len(rows)} {what}{'s' * (len(rows) > 1)}"
                yield Details(title, [runs_table(self.outline, rows)])
        groups: dict[tuple[str, str, str], list[RunRow]] = {}
        for row in [*final, *trials]:
            groups.setdefault((row.stage, row.rival, row.point), []).append(row)
        if groups:
            yield Heading(_CONFIGS, 3)
        for (stage, rival, point), rows in groups.items():
            if stage == "tune":
                inner = [Details(f"Trial {row.trial}", [Code(_config(self.study, row))]) for row in rows]
                yield Details(f"{rival} at {point}, {len(rows)} trials", inner)
            else:
                seeds = ", ".join(str(row.seed) for row in rows[1:])
                same = f"; that of {seeds} differs by training.seed alone" if seeds else ""
                title = f"{rival} at {point}, seed {rows[0].seed}{same}"
                yield Details(title, [Code(_config(self.study, rows[0]))])


def _config(study: Study, row: RunRow) -> str:
    """A run's config; where its folder is gone, what its row says of it."""
    file = RunFolder(study.out / row.run).config
    if file.exists():
        return file.read_text(encoding="utf-8")
    plain = {
        "model": {"interaction": row.interaction},
        "settings": row.settings,
        "training": {"seed": row.seed},
    }
    return yaml.safe_dump(plain, sort_keys=False)


def _test_rows(study: Study) -> str:
    tuning = study.recipe.tuning
    text = "The test rows are read once a final run, at its end; nothing is chosen by them."
    if tuning is None:
        return f"Nothing is tuned: every rival is trained with the recipe's config. {text}"
    keys = ", ".join(tuning.space) or "nothing"
    return (
        f"Every rival was tuned by {tuning.trials} trials, its config as it stands first and then draws of "
        f"Optuna's TPE, over the same space ({keys}) and its own published one, by validation rows alone. {text}"
    )


def _details(table: Table | None) -> list[Block]:
    """A table under its caption, folded."""
    return [] if table is None else [Details(table.caption, [table])]


def _tables(*tables: Block | None) -> list[Block]:
    return [table for table in tables if table is not None]
