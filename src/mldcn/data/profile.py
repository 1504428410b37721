"""One column of a log's sample: what it seems to mean, and whether it could be known only after the label."""

from __future__ import annotations

import contextlib
import re
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from mldcn.data import cells
from mldcn.data.reading import RawBlock
from mldcn.errors import UserError
from mldcn.layout import Source

Role = Literal["feature", "label", "outcome", "time", "request", "position", "weight", "leak", "left out"]
Kind = Literal["numeric", "categorical", "multi", "embedding", "sequence"]

LABEL = r"(label|target|clicks?|clicked|is_?click(ed)?|clk|y)"
OUTCOME = re.compile(
    r"dwell|watch_?time|play_?time|conver[ts]|purchas|checkout|revenue|payment|paid|bought|order(ed|_id)"
    r"|click_?(time|ts|timestamp|at)|post_?click|after_?click|rating|stars|review|saved?$|liked?$|is_like|repin"
    r"|follow(ed)?$|is_follow|shared?$|comment(ed)?$|hide$|is_hate|long_?view|outbound|install(ed)?$|bounce|closeup",
    re.IGNORECASE,
)
# Of a column of zeros and ones; a counter of clicks is called so too.
CLICK = re.compile(rf"^{LABEL}$|_click(ed)?$", re.IGNORECASE)
_TIME = re.compile(r"(^|_)(time|timestamp|ts|date|datetime|hour|unixtime|created_at)($|_)", re.IGNORECASE)
_REQUEST = re.compile(
    r"(^|_)(request|req|session|impression|query|auction|page_?view|search)(_?id)?$", re.IGNORECASE
)
USER = re.compile(r"^(user|member|visitor|viewer|customer|uid|cookie|device)(_?id)?$", re.IGNORECASE)
_POSITION = re.compile(r"^((ad|display|item|slot)_?)?(position|pos|rank|slot)$", re.IGNORECASE)
_WEIGHT = re.compile(
    r"^(sample|row|example|instance|impression|importance|loss|ips)_?weights?$", re.IGNORECASE
)
_SEQUENCE = re.compile(r"hist|seq|recent|last_|past|behavio|engaged|clicked_", re.IGNORECASE)
_ID = re.compile(
    r"(^|_)(id|ids|uid|code|hash|zip|zip_?code|type|category|cat|cate|brand|class|group|bucket)$",
    re.IGNORECASE,
)
# Of whole numbers: whom or what they stand for, and not how many.
_ENTITY = re.compile(
    r"^(u|i|user|member|item|ad|advertiser|pin|movie|film|video|photo|product|goods|campaign|creative|banner|adgroup"
    r"|content|news|article|song|track|artist|author|listing|doc|genre|publisher|app|gender|sex|occupation|country"
    r"|city)$",
    re.IGNORECASE,
)
_COUNT = re.compile(
    r"count|cnt|num_|_num|n_|age$|price|amount|ctr|rate|score|freq|days|length|len$|size", re.IGNORECASE
)
_ITEM_WORDS = (
    "item|ad|ads|advertiser|pin|movie|film|video|photo|product|goods|sku|campaign|creative|banner|adgroup|brand"
    "|category|cate|content|news|article|song|track|artist|author|listing|doc|genre|genres|price|publisher|app"
)
_USER_WORDS = (
    "user|member|visitor|viewer|customer|uid|cookie|device|gender|sex|age|occupation|zip|country|city|income"
)
_SOURCES: tuple[tuple[Source, re.Pattern[str]], ...] = (
    (
        "user_item",
        re.compile(rf"^(user|u|member)_({_ITEM_WORDS})(_|s?$)|^(user_item|ui|cross)_", re.IGNORECASE),
    ),
    ("user", re.compile(rf"^({_USER_WORDS}|u)(_|id$|$)", re.IGNORECASE)),
    ("item", re.compile(rf"^({_ITEM_WORDS}|i)(_|id$|$)", re.IGNORECASE)),
)
_DELIMITERS = ("|", ";", ",", " ")
# A single column that ranks the label this well is nearly the label.
_LEAK_AUC = 0.95
_LEAK_ROWS = 200


@dataclass(frozen=True)
class ColumnFacts:
    """One column of the sample.

    reason: why it is taken for a leak or left out. width: of an embedding. times, actions: a sequence's
    columns. whole: all its numbers are whole. shift: the transform that suits a number.
    """

    name: str
    role: Role
    kind: Kind
    source: Source
    distinct: int
    missing: float
    examples: tuple[str, ...]
    reason: str = ""
    delimiter: str | None = None
    width: int = 0
    longest: int = 0
    transform: str = "identity"
    times: str | None = None
    actions: str | None = None
    share: str | None = None


@dataclass(frozen=True)
class Look:
    """One column of the sample, looked at.

    texts: its values, or the elements of a list column. elements: its values, or those of its lists.
    """

    name: str
    array: pa.Array
    texts: pa.Array
    elements: pa.Array
    numbers: NDArray[np.float64] | None
    lists: cells.Lists | None
    delimiter: str | None
    is_time: bool
    distinct: int
    missing: float


def is_readable(block: RawBlock, name: str) -> bool:
    """Whether a column holds plain values or lists of them, and not structures or bytes."""
    kind = block.table.schema.field(name).type
    inner = kind.value_type if cells.is_list(kind) or pa.types.is_dictionary(kind) else kind
    return not (pa.types.is_nested(inner) or pa.types.is_binary(inner) or pa.types.is_large_binary(inner))


def look_at(block: RawBlock, name: str) -> Look:
    """Reads a column in every way that it allows."""
    array = cells.column(block, name)
    missing = array.null_count / len(array)
    if cells.is_list(array.type):
        found = cells.lists(block, name, "|")
        if pa.types.is_floating(found.flat.type):
            # A few are enough to show, and no two agree.
            few_texts = pa.array(
                [f"{x:.4g}" for x in found.flat.drop_null().slice(0, 3).to_pylist()], pa.string()
            )
            return Look(name, array, few_texts, few_texts, None, found, None, False, len(found.flat), missing)
        texts = cells.texts(block, name, found.flat)
        distinct = pc.count_distinct(texts, mode="only_valid").as_py()
        return Look(name, array, texts, texts, None, found, None, False, distinct, missing)
    texts, numbers, is_time = cells.texts(block, name), None, False
    distinct = pc.count_distinct(texts, mode="only_valid").as_py()
    # Trying the first rows alone first saves reading whole columns of text as numbers in vain.
    few = RawBlock(block.table.slice(0, 1_000), block.file, block.first_row)
    try:
        cells.numbers(few, name)
        numbers = cells.numbers(block, name)
    except UserError:
        with contextlib.suppress(UserError):
            cells.times(few, name)
            cells.times(block, name)
            is_time = True
    delimiter = None
    if numbers is None and not is_time:
        delimiter = _delimiter(texts, distinct)
    cut = cells.lists(block, name, delimiter) if delimiter else None
    elements = cells.texts(block, name, cut.flat) if cut is not None else texts
    return Look(name, array, texts, elements, numbers, cut, delimiter, is_time, distinct, missing)


def _delimiter(texts: pa.Array, distinct: int) -> str | None:
    """The delimiter whose pieces come again in other rows, if there is one."""
    there = texts.drop_null()
    if not len(there):
        return None
    for delimiter in _DELIMITERS:
        share = pc.mean(pc.match_substring(there, delimiter).cast(pa.int8())).as_py()
        if share < 0.2:
            continue
        pieces = pc.split_pattern(there, delimiter).flatten()
        numeric = bool(pc.all(pc.match_substring_regex(pieces, r"^-?[0-9.eE+-]*$")).as_py())
        # Free text has blanks, and commas, but its pieces are no ids.
        if delimiter in (" ", ",") and not numeric:
            continue
        if numeric or pc.count_distinct(pieces).as_py() < max(distinct, 2):
            return delimiter
    return None


def as_truth(look: Look) -> NDArray[np.float64] | None:
    """The column as 0 and 1 (NaN where missing), if it has both and nothing else."""
    values = look.numbers
    if look.lists is not None or look.is_time or look.distinct > 4:
        return None
    if values is None:
        lower = pc.utf8_lower(look.texts)
        if not pc.all(pc.is_in(lower, value_set=pa.array(["true", "false"]), skip_nulls=True)).as_py():
            known = pc.all(pc.is_in(lower.drop_null(), value_set=pa.array(["true", "false"]))).as_py()
            if not known:
                return None
        values = pc.cast(pc.equal(lower, "true"), pa.float64()).to_numpy(zero_copy_only=False)
    found = np.unique(values[~np.isnan(values)])
    return values if np.array_equal(found, [0, 1]) else None


def judge(look: Look, label: str, binary: list[str], target: NDArray[np.float64]) -> ColumnFacts:
    """What one column is."""
    kind, width, longest = _kind(look)
    facts = ColumnFacts(
        name=look.name,
        role="feature",
        kind=kind,
        source="user" if kind == "sequence" else _source(look.name),
        distinct=look.distinct,
        missing=look.missing,
        examples=_examples(look),
        delimiter=look.delimiter,
        width=width,
        longest=longest,
        transform=_transform(look) if kind == "numeric" else "identity",
    )
    if look.name == label:
        return replace(facts, role="label")
    if look.name in binary and any(pattern.search(look.name) for pattern in (OUTCOME, CLICK)):
        return replace(facts, role="outcome", reason="an outcome, known only after the impression")
    if look.distinct == 0:
        return replace(facts, role="left out", reason="empty in all rows looked at")
    if look.name.lower() in ("split", "fold", "partition"):
        return replace(facts, role="left out", reason="says which part of a split the row is in")
    reason = _leak(look, label, target)
    if reason:
        return replace(facts, role="leak", reason=reason)
    if look.lists is None:
        if look.is_time or (look.numbers is not None and _TIME.search(look.name) and look.distinct > 24):
            if look.missing:
                return replace(
                    facts, role="left out", reason=f"a time, missing in {look.missing:.1%} of the rows"
                )
            return replace(facts, role="time")
        if _REQUEST.search(look.name):
            return replace(facts, role="request")
        if _POSITION.search(look.name) and look.numbers is not None and np.nanmin(look.numbers) >= 1:
            return replace(facts, role="position")
        if _WEIGHT.search(look.name) and look.numbers is not None and (look.numbers >= 0).all():
            return replace(facts, role="weight")
        if kind == "categorical" and look.distinct == len(look.array) and look.distinct > 100:
            return replace(facts, role="left out", reason="another value in every row")
    return facts


def _kind(look: Look) -> tuple[Kind, int, int]:
    """The kind, an embedding's width, the longest list."""
    if look.lists is not None:
        flat, lengths = look.lists.flat, look.lists.lengths
        there = lengths[lengths > 0]
        longest = int(lengths.max(initial=0))
        floats = pa.types.is_floating(flat.type) or (
            cells.is_text(flat.type)
            and bool(pc.any(pc.match_substring(flat, ".")).as_py())
            and _all_numbers(flat)
        )
        if floats and len(there) and there.min() == longest and longest > 1:
            return "embedding", longest, longest
        return ("sequence" if _SEQUENCE.search(look.name) else "multi"), 0, longest
    if look.numbers is None or _ID.search(look.name) or USER.search(look.name):
        return "categorical", 0, 0
    numbers = look.numbers[~np.isnan(look.numbers)]
    if bool((numbers != np.floor(numbers)).any()) or _COUNT.search(look.name):
        return "numeric", 0, 0
    if _ENTITY.search(look.name):
        return "categorical", 0, 0
    # Few whole numbers: codes, hours, days of a week or month.
    return ("categorical" if look.distinct <= 31 else "numeric"), 0, 0


def _all_numbers(flat: pa.Array) -> bool:
    return next(cells.failures(flat, lambda part: pc.cast(part, pa.float64())), None) is None


def _transform(look: Look) -> str:
    """A logarithm for heavy tails."""
    assert look.numbers is not None
    values = look.numbers[~np.isnan(look.numbers)]
    if not len(values):
        return "identity"
    middle, high = np.quantile(np.abs(values), [0.5, 0.99])
    if high <= 10 * max(middle, 1.0):
        return "identity"
    return "log" if values.min() >= 0 else "signed_log"


def _source(name: str) -> Source:
    for source, pattern in _SOURCES:
        if pattern.search(name):
            return source
    return "context"


def _examples(look: Look) -> tuple[str, ...]:
    counts = pc.value_counts(look.elements.drop_null().slice(0, 10_000))
    most = sorted(counts.to_pylist(), key=lambda pair: (-pair["counts"], pair["values"]))[:3]
    return tuple(str(pair["values"])[:24] for pair in most)


def _leak(look: Look, label: str, target: NDArray[np.float64]) -> str:
    """Why a column is known only after what it should predict; empty if nothing says so."""
    if OUTCOME.search(look.name) and not _is_history(look):
        return "its name says that it is known only after the impression"
    if look.lists is not None and not look.delimiter:
        there = look.lists.lengths > 0
    elif look.numbers is not None:
        there = ~np.isnan(look.numbers) & (look.numbers != 0)
    else:
        there = pc.is_valid(look.array).to_numpy(zero_copy_only=False)
    known = ~np.isnan(target)
    positive, there = target[known] == 1, there[known]
    if positive.sum() >= 20 and (~positive).sum() >= 20:
        if there[positive].mean() >= 0.5 and not there[~positive].any():
            return f"empty or zero whenever {label} is 0"
        if there[~positive].mean() >= 0.5 and not there[positive].any():
            return f"empty or zero whenever {label} is 1"
    if len(positive) >= _LEAK_ROWS and look.lists is None:
        auc = _single_auc(look, known, positive)
        if max(auc, 1 - auc) >= _LEAK_AUC:
            return f"alone it ranks {label} with an AUC of {max(auc, 1 - auc):.3f}"
    return ""


def _is_history(look: Look) -> bool:
    """Past outcomes, such as a user's last clicks or a prior rate, are known before."""
    return bool(
        look.lists is not None or re.search(r"hist|prior|prev|past|last|avg|mean|rate$|_cnt|count", look.name)
    )


def _single_auc(look: Look, known: NDArray[np.bool_], positive: NDArray[np.bool_]) -> float:
    """How well the column alone ranks the label: by its numbers, or by its ids' click rates in other rows."""
    if look.numbers is not None and look.distinct > 20:
        there = ~np.isnan(look.numbers[known])
        return _auc(look.numbers[known][there], positive[there])
    codes = pc.fill_null(look.texts.dictionary_encode().indices, look.distinct).to_numpy(
        zero_copy_only=False
    )[known]
    odd = np.arange(len(codes)) % 2 == 1
    size = look.distinct + 1
    shown = np.bincount(codes[odd], minlength=size)
    rates = (np.bincount(codes[odd & positive], minlength=size) + positive.mean()) / (shown + 1)
    return _auc(rates[codes[~odd]], positive[~odd])


def _auc(scores: NDArray[np.float64], positive: NDArray[np.bool_]) -> float:
    """Share of (positive, negative) pairs in the right order, ties one half."""
    positives, negatives = int(positive.sum()), int((~positive).sum())
    if not positives or not negatives:
        return 0.5
    _, at, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[at]
    return float((ranks[positive].sum() - positives * (positives + 1) / 2) / (positives * negatives))
