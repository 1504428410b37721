"""``explain``: everything that is shown of what a run learned, as plain data."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from mldcn import interactions
from mldcn.data.shards import EncodedRows
from mldcn.errors import UserError
from mldcn.explain.crosses import (
    CrossMatrix,
    CrossSite,
    Floats,
    block_norms,
    change,
    cross_matrix,
    cross_sites,
    crossed_signal,
    numerical_rank,
    scaler,
    singular_values,
    strongest_pairs,
)
from mldcn.explain.importance import (
    Columns,
    Importance,
    Progress,
    feature_columns,
    permutation_importance,
)
from mldcn.explain.masks import (
    MaskedExample,
    MaskSite,
    MaskSummary,
    Moments,
    Numbers,
    listening,
    mask_sites,
    masked_example,
    summarise,
)
from mldcn.explain.sample import Sample, draw_sample, one_row, probabilities
from mldcn.layout import FieldLayout
from mldcn.model import Ranker
from mldcn.predict import Predictor, calibrated

TOLERANCES = (0.1, 0.01)
SAMPLE_ROWS = 20_000
START_ROWS = 4_096  # that the initial weights are looked at with
SIGNAL_ROWS = 2_048
REPEATS = 5


@dataclass(frozen=True)
class Spectrum:
    """Singular values, the largest first, and by tolerance how many are at least so much of the largest."""

    values: Floats
    ranks: Mapping[float, int]

    @classmethod
    def of(cls, matrix: CrossMatrix) -> Spectrum:
        """A matrix's."""
        values = singular_values(matrix)
        return cls(values, {t: numerical_rank(values, t) for t in TOLERANCES})


@dataclass(frozen=True)
class CrossLayer:
    """A cross layer: its blocks' norms ``(F, F)``, how far training moved them, their size on data, its
    spectrum.

    ``initial`` is the spectrum of the weights that training began with. ``gain`` is the root mean square of
    the gain of the norm behind the crosses, where there is one.
    """

    name: str
    formula: str
    width: int
    norms: Floats
    changed: Floats | None
    signal: Floats | None
    learned: Spectrum
    initial: Spectrum
    gain: float | None


@dataclass(frozen=True)
class Mask:
    """A mask's behaviour: over all its directions, by field and by source (empty for hidden units)."""

    name: str
    directions: int
    of_fields: bool
    whole: MaskSummary
    by_field: Mapping[str, MaskSummary]
    by_source: Mapping[str, MaskSummary]


@dataclass(frozen=True)
class Explanation:
    """What a run learned.

    fields: names of ``x0``'s fields; sources: theirs. importances: of features, and of all features of a
    source where there are several sources. metrics: task -> metric -> value on the sample. example: the row,
    its labels and probabilities by task, and what the masks do to it.
    """

    run: str
    interaction: str
    title: str
    tasks: tuple[str, ...]
    where: str
    rows: int
    total: int
    unit: str
    repeats: int
    warm: bool
    fields: tuple[str, ...]
    sources: tuple[str, ...]
    widths: tuple[int, ...]
    crosses: tuple[CrossLayer, ...]
    masks: tuple[Mask, ...]
    metrics: Mapping[str, Mapping[str, float]]
    importances: tuple[Importance, ...]
    groups: tuple[Importance, ...]
    row: int
    labels: Mapping[str, float | None]
    scores: Mapping[str, float]
    example: tuple[MaskedExample, ...]

    @property
    def layout(self) -> FieldLayout:
        """The fields of ``x0``."""
        named = zip(self.fields, self.widths, strict=True)
        return FieldLayout.build([(name, "embedding", "context", width) for name, width in named])

    def pairs(self, layer: CrossLayer) -> list[tuple[str, str, float]]:
        """A layer's pairs of fields, the strongest first."""
        return strongest_pairs(layer.norms, self.layout)

    def moved(self, layer: CrossLayer) -> list[tuple[str, str, float]]:
        """A layer's pairs of fields by what training changed in their blocks; empty where it is not known."""
        return [] if layer.changed is None else strongest_pairs(layer.changed, self.layout)

    def loudest(self, layer: CrossLayer) -> list[tuple[str, str, float]]:
        """A layer's pairs of fields by the size of their crosses on rows; empty where it is not known."""
        return [] if layer.signal is None else strongest_pairs(layer.signal, self.layout)

    def ranked(self, task: str, metric: str = "auc") -> list[Importance]:
        """A task's features, the most important first."""
        own = [i for i in self.importances if (i.task, i.metric) == (task, metric)]
        return sorted(own, key=lambda importance: -importance.drop)

    def to_json(self) -> dict[str, Any]:
        """All of it as plain data."""
        plain = {"format": 1, "tolerances": list(TOLERANCES), **asdict(self)}
        for layer, shown in zip(self.crosses, plain["crosses"], strict=True):
            shown["norms"] = layer.norms.tolist()
            for which, blocks in (("changed", layer.changed), ("signal", layer.signal)):
                shown[which] = None if blocks is None else blocks.tolist()
            for which in ("learned", "initial"):
                shown[which]["values"] = shown[which]["values"].tolist()
            shown["pairs"] = [{"a": a, "b": b, "norm": norm} for a, b, norm in self.pairs(layer)]
        found: dict[str, Any] = _without_nan(plain)
        return found


@torch.no_grad()
def explain(
    predictor: Predictor,
    rows: EncodedRows,
    where: str,
    *,
    row: int = 0,
    sample_rows: int = SAMPLE_ROWS,
    repeats: int = REPEATS,
    seed: int = 0,
    progress: Progress | None = None,
) -> Explanation:
    """Looks at what a run learned, with rows that it was not trained on.

    Memory holds ``sample_rows`` encoded rows and a batch, however many rows there are.

    Args:
        predictor: the run's model.
        rows: encoded by the run's encoder, with labels.
        where: what they are, in words.
        row: the number of the example whose masks are shown, from 0 on.
        sample_rows: rows to draw, at most.
        repeats: permutations of each feature.
        seed: of the sample and the permutations.
        progress: told how far the permutations are.

    Raises:
        UserError: there are no rows, or not this one.
    """
    model, config = predictor.model, predictor.config
    layout = model.embedder.layout
    example = one_row(rows, row).to(predictor.device)
    sample = draw_sample(rows, sample_rows, seed)
    interaction = model.scorer.interaction
    masks = list(mask_sites(interaction, layout))
    scaled, moments = _observe(predictor, model, masks, sample, len(sample))
    crosses = _crosses(predictor, scaled, sample)

    def score(ids: Any, dense: Any) -> Any:
        return probabilities(predictor, sample, ids, dense)

    columns = feature_columns(rows.layout)
    source = {feature.name: feature.source for feature in config.log_schema.features}
    groups: dict[str, Columns] = {}
    for name, own in columns.items():
        key = source[name]
        groups[key] = groups[key].joined(own) if key in groups else own
    # A group's name could be a feature's.
    named = {f"feature {name}": own for name, own in columns.items()}
    if len(groups) > 1:
        named |= {f"all {name}": own for name, own in groups.items()}
    metrics, found = permutation_importance(
        score, sample, named, model.tasks, repeats=repeats, seed=seed, progress=progress
    )
    if not metrics:
        raise UserError(f"{where}: every label has one class only; name a log with both with --log")
    seen = {
        kind: tuple(
            replace(i, feature=i.feature.removeprefix(kind)) for i in found if i.feature.startswith(kind)
        )
        for kind in ("feature ", "all ")
    }
    shown = [
        Mask(site.name, len(m.means), site.of_fields, _whole(m), *_by_field(site, m, layout))
        for site, m in zip(masks, moments, strict=True)
    ]
    at = model.relevance(example.ids, example.dense).float()
    if model.position_bias is not None:
        at = at + model.position_logit(example.position)
    scores = calibrated(torch.sigmoid(at).cpu().numpy(), model.tasks, predictor.calibrators)
    given = dict(zip(model.tasks, example.labels[0].tolist(), strict=True))
    return Explanation(
        run=predictor.run.path.name,
        interaction=config.model.interaction["name"],
        title=interactions.info(config.model.interaction["name"]).title,
        tasks=model.tasks,
        where=where,
        rows=len(sample),
        total=sample.total,
        unit=sample.unit,
        repeats=repeats,
        warm=_warm(predictor),
        fields=tuple(field.name for field in layout),
        sources=tuple(field.source for field in layout),
        widths=layout.widths,
        crosses=tuple(crosses),
        masks=tuple(shown),
        metrics=metrics,
        importances=seen["feature "],
        groups=seen["all "],
        row=row,
        labels={task: None if math.isnan(label) else label for task, label in given.items()},
        scores=dict(zip(model.tasks, scores[0].tolist(), strict=True)),
        example=tuple(
            masked_example(masks, moments, layout, lambda: model.relevance(example.ids, example.dense))
        )
        if masks
        else (),
    )


def initial_model(predictor: Predictor) -> Ranker:
    """The model with the weights that the run's training began with: drawn again from its seed.

    A run that was started from another one began with that one's weights instead.
    """
    config = predictor.config
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.training.seed)
        model = Ranker(config.model, config.log_schema, predictor.encoder.layout)
    return model.to(predictor.device).eval()


def _observe(
    predictor: Predictor, model: Ranker, masks: Sequence[MaskSite], sample: Sample, count: int
) -> tuple[dict[str, Tensor], list[Moments]]:
    """The mean scales of cross layers by name, and the moments of the masks, over the sample's first rows."""
    sites = list(cross_sites(model.scorer.interaction))
    scalers = {site.name: found for site in sites if (found := scaler(site.layer)) is not None}
    heard = [Moments() for _ in range(len(scalers) + len(masks))]
    listened: list[tuple[nn.Module, Numbers]] = [(s.module, s.numbers) for s in scalers.values()]
    listened += [(site.mask, lambda inputs, output: output) for site in masks]
    if listened:
        size = predictor.config.training.eval_batch_size
        with listening(listened, lambda i, numbers: heard[i].add(numbers)):
            for start in range(0, count, size):
                part = slice(start, min(start + size, count))
                tensors = [torch.from_numpy(a[part]).to(predictor.device) for a in (sample.ids, sample.dense)]
                model.relevance(*tensors)
    device = predictor.device
    means = {
        name: torch.from_numpy(m.means).float().to(device) for name, m in zip(scalers, heard, strict=False)
    }
    return means, heard[len(scalers) :]


def _crosses(predictor: Predictor, means: Mapping[str, Tensor], sample: Sample) -> list[CrossLayer]:
    model, warm = predictor.model, _warm(predictor)
    sites = list(cross_sites(model.scorer.interaction))
    if not sites:
        return []
    fresh = initial_model(predictor)
    at_start, _ = _observe(predictor, fresh, (), sample, min(START_ROWS, len(sample)))
    starts = cross_sites(fresh.scorer.interaction)
    layout = model.embedder.layout
    few = slice(0, min(SIGNAL_ROWS, len(sample)))
    with torch.no_grad():
        given = [torch.from_numpy(a[few]).to(predictor.device) for a in (sample.ids, sample.dense)]
        x0 = model.embedder(*given)
    found = []
    for site, start in zip(sites, starts, strict=True):
        matrix, initial = cross_matrix(site, means), cross_matrix(start, at_start)
        # Of a run that began with another one's weights, the seed's are not where it began.
        moved = None if warm else change(matrix, initial)
        found.append(
            CrossLayer(
                name=site.name,
                formula=matrix.formula,
                width=len(matrix.left),
                norms=block_norms(matrix, layout),
                changed=None if moved is None else block_norms(moved, layout),
                signal=crossed_signal(site, matrix, x0, layout),
                learned=Spectrum.of(matrix),
                initial=Spectrum.of(initial),
                gain=_gain(site),
            )
        )
    return found


def _warm(predictor: Predictor) -> bool:
    """Whether a run began with another one's weights."""
    return "warm_start" in predictor.run.info()


def _gain(site: CrossSite) -> float | None:
    norm = getattr(site.layer, "norm", None)
    weight = getattr(norm, "weight", None)
    return float(weight.detach().float().square().mean().sqrt()) if isinstance(weight, Tensor) else None


def _whole(moments: Moments) -> MaskSummary:
    found = summarise(moments)
    assert found is not None
    return found


def _by_field(
    site: MaskSite, moments: Moments, layout: FieldLayout
) -> tuple[dict[str, MaskSummary], dict[str, MaskSummary]]:
    """A mask's behaviour by field and by source: of the directions, weighed by the field's share in them."""
    shares = site.shares(layout)
    if shares is None:
        return {}, {}
    fields: dict[str, MaskSummary] = {}
    sources: dict[str, MaskSummary] = {}
    for i, field in enumerate(layout):
        if (of_field := summarise(moments, shares[:, i])) is not None:
            fields[field.name] = of_field
    for source in dict.fromkeys(field.source for field in layout):
        own = [i for i, field in enumerate(layout) if field.source == source]
        if (of_source := summarise(moments, shares[:, own].sum(axis=1))) is not None:
            sources[source] = of_source
    return fields, sources


def _without_nan(value: Any) -> Any:
    """Plain data with None for what JSON has no number for."""
    if isinstance(value, dict):
        return {str(key): _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
