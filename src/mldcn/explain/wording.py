"""An explanation's sentences: what was found, and how to read it."""

from __future__ import annotations

from collections.abc import Iterator

from mldcn.explain.explanation import Explanation
from mldcn.report.text import number

SOURCES = {"user": "user", "item": "item", "user_item": "user and item", "context": "context"}


def findings(found: Explanation) -> list[str]:
    """The main points in sentences."""
    task = next(iter(found.metrics))
    ranked = found.ranked(task)
    shown = [i for i in ranked if i.low > 0]
    sentences = []
    if shown:
        first = ", ".join(f"{i.feature} ({number(-i.drop, '+.4f')})" for i in shown[:3])
        sentences.append(f"Permuting a feature costs the AUC of {task} most with {first}.")
    none = len(ranked) - len(shown)
    if none:
        sentences.append(f"For {none} of {len(ranked)} features no importance is shown.")
    if found.crosses:
        layer = found.crosses[0]
        for start, pairs in (
            (f"The largest weights of {layer.name} cross", found.pairs(layer)),
            ("Training changed most those of", found.moved(layer)),
            ("On these rows its largest crosses are those of", found.loudest(layer)),
        ):
            named = ", ".join(f"{a} × {b}" for a, b, size in pairs[:3] if size > 0)
            if named:
                sentences.append(f"{start} {named}.")
    else:
        sentences.append(without_crosses(found))
    if found.masks:
        first_mask = found.masks[0]
        whole = first_mask.whole
        sentences.append(
            f"The mask of {first_mask.name} has mean {number(whole.mean, '.2f')} and moves by "
            f"{number(whole.over_examples, '.2f')} from example to example."
        )
    return sentences


def without_crosses(found: Explanation) -> str:
    """Why there is no heat map."""
    return (
        f"{found.title} has no matrix that crosses fields of x0 with fields of its layers' input, so there "
        "is no heat map of pairs and no spectrum; the importance of features does not need one."
    )


def reading(found: Explanation) -> Iterator[str]:
    """How to read the page, as far as it has what is explained."""
    units = {"user": "by user", "request": "by request", "row": "taking rows as independent"}[found.unit]
    yield (
        f"Intervals are 95%, {units}, and allow for the chance of the {found.repeats} permutations. They "
        "hold for one feature at a time: of many features without any importance, about one in forty lies "
        "above 0 by chance."
    )
    yield (
        "What two features tell alike is lost with neither: each can look unimportant because the other is "
        "still there. Permuting all features of a source together shows what they hold in common."
    )
    yield (
        "A permuted row can be one that never occurs, such as a user with another user's history. Importance "
        "says what this model lives on, not what a model without the feature would reach."
    )
    if found.crosses:
        yield (
            "Only the first layer reads the fields themselves. What later layers read holds the crosses of "
            "the layers before them in the same columns."
        )
        yield "A block's norm is of weights: whether a strong block helps is for a model without it to show."
