r"""The true probabilities of ``pinads``: every term, in closed form, for any (user, item, context).

For task t and an impression x = (user, item, context)

.. math:: p_t(x) = \sigma\Bigl(b_t - e_t \ln(\text{position}) + \sum_{\text{term}} w_{\text{term}}\, z_{\text{term},t}(x)\Bigr)

Each z has mean 0 and deviation 1 over the world's traffic, so a weight *is* that term's share of the logit's
deviation; b_t sets the task's mean rate. e_t is ``position_effect`` for click and save, and 0 for good and
outbound click, whose probabilities are conditional on a click (the position got its due there).

Fields. A term sees an impression through thirteen fields: age group, gender, country, log tenure, user taste;
category, format, advertiser, log price, pin taste; surface, device, hour, weekday. A categorical field gives
each of its values a random number per use, a numeric or taste field a smooth random function (tanh of a
random direction), all standardised to mean 0 and deviation 1 over their entities. Call it xi_f(x).

The terms, each with its own random numbers:

``main``      order 1: sum over all fields of xi_f.
``identity``  order 1: a number for each user plus the pin's quality. Only ids, counters and the prior CTR
              reveal it. Kept small, so that the log does not reward memorising ids.
``match``     order 2: sum over taste dimensions k of a_tk * user_k * pin_k, a_tk in {-1, ..., 1} mostly positive.
``pairs``     order 2: sum over 12 random pairs (f, g) of fields of xi_f * xi_g.
``cross``     orders 3, 4, 5, 6: sum over several products of k distinct fields' factors. A factor is
              sqrt(1 - s) + sqrt(s) * xi_f, s = 0.6: a soft condition ("fashion, evening, on a phone ..."), so a
              product is a soft AND. Of a k-fold product's energy the share C(k,j) s^j (1-s)^(k-j) lies on
              order j, so low orders give a learner a first hold, as they do in real logs. Each product spans
              at least one user field and one item field.
``gated``     crosses whose relevance depends on the instance: four intents, each with its own products of 2
              or 3 factors (s = 0.8); the softmax of four sums of xi_f over surface, device, hour, age, user
              taste and category says how much each intent counts. Near one-hot for most impressions.
``dense``     a random MLP with two hidden tanh layers of 32 on all fields: no sparse product structure.

With ``drift`` d, the numbers of ``identity``'s quality and the loadings of ``pairs``, ``cross``, ``gated`` and
``dense`` move at midnight: x(day) = sqrt(1 - d) x(day - 1) + sqrt(d) new, the new ones drawn as the first were.
So ads' rates and the interactions' strengths wander, their deviation stays, and the probability of an impression
still follows from its user, item and context alone, whose time names the day.

Nothing here follows the equations of any model in this package: products of soft conditions are a common
account of feature crosses, gates are a softmax mixture (the form of DCN-Mix and MMoE rather than of a mask),
and ``dense`` is a plain MLP. ``truth`` and ``weights`` turn the terms up, down and off.
"""  # noqa: E501

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from mldcn.datasets.pinads.world import (
    AGE_GROUPS,
    CATEGORIES,
    COUNTRIES,
    DAY,
    DEVICE_SHARES,
    DEVICES,
    FORMATS,
    GENDERS,
    START,
    SURFACE_SHARES,
    SURFACES,
    TASKS,
    TASTE,
    Contexts,
    Floats,
    Ints,
    Items,
    PinadsConfig,
    Singles,
    Users,
    dot,
    draw_items,
    draw_users,
    pick,
    stream,
)

# Deviation of each term in logits. The three kinds of truth have about the same total deviation (1.65), so
# that their Bayes AUC is alike and only the shape of the function differs. In the mixed truth the crosses whose
# relevance depends on the instance weigh most. That is a choice, made after a look at models: with the two kinds
# of crosses at about one weight, DCN-V2 and ML-DCN came out level. Show ``low_order`` and ``dense`` beside it.
WEIGHTS = {
    "mixed": {"main": 0.4, "identity": 0.15, "match": 0.5, "pairs": 0.4, "cross": 0.7, "gated": 1.25},
    "low_order": {"main": 0.9, "identity": 0.15, "match": 1.1, "pairs": 0.8},
    "dense": {"main": 0.3, "identity": 0.15, "dense": 1.6},
}
TERMS = ("main", "identity", "match", "pairs", "cross", "gated", "dense")

PAIRS = 12
CROSSES = {3: 6, 4: 5, 5: 4, 6: 3}  # order: number of products
CROSS_SHARPNESS = 0.6
INTENTS = 4
GATED_ORDERS = (2, 3, 2, 3)  # the products of each intent
GATED_SHARPNESS = 0.8
GATE_SCALE = 3.0  # deviation of the gate's logits
HIDDEN = 32
TASK_SHARE = 0.3  # share of a loading's variance that is a task's own; the rest is common to all tasks
TRAFFIC = 20_000  # impressions drawn to standardise the terms

USER_FIELDS = ("age", "gender", "country", "tenure", "user_taste")
ITEM_FIELDS = ("category", "format", "advertiser", "price", "pin_taste")
CONTEXT_FIELDS = ("surface", "device", "hour", "weekday")
FIELDS = USER_FIELDS + ITEM_FIELDS + CONTEXT_FIELDS
GATE_FIELDS = ("surface", "device", "hour", "age", "user_taste", "category")


@dataclass(frozen=True)
class Codes:
    """How a context field's values are found: its cardinality and their shares of the traffic."""

    values: int
    shares: tuple[float, ...]


@dataclass(frozen=True)
class Split:
    """A function of an impression as one array a user, one an item and one a value of each context field.

    ``product`` says whether the parts multiply (crosses) or add up (everything else).
    """

    users: Singles  # (users, J)
    items: Singles  # (items, J)
    contexts: tuple[Singles, ...]  # (values of the field, J) each
    product: bool

    def __call__(self, users: Ints, items: Ints, contexts: Contexts) -> Floats:
        """Values ``(n, J)`` for n impressions."""
        total = self.users[users].astype(np.float64)
        parts = [self.items[items]]
        codes = (contexts.surface, contexts.device, contexts.hour, contexts.weekday)
        parts += [table[code] for table, code in zip(self.contexts, codes, strict=True)]
        for part in parts:
            if self.product:
                total *= part
            else:
                total += part
        return total


class Drifting:
    """Numbers that move at midnight, or stand still where ``drift`` is 0.

    Args:
        first: those of day 0.
        drift: share of their variance that is new each day.
        draw: draws numbers like the first ones.
        seed: of the world.
        key: tells these numbers from others that drift.
    """

    def __init__(
        self,
        first: Floats,
        drift: float,
        draw: Callable[[np.random.Generator], Floats],
        seed: int,
        key: int,
    ) -> None:
        self._days = [first]
        self._drift, self._draw, self._seed, self._key = drift, draw, seed, key

    def on(self, day: int) -> Floats:
        """The numbers of a day."""
        if not self._drift:
            return self._days[0]
        while len(self._days) <= day:
            new = self._draw(stream(self._seed, 11, self._key, len(self._days)))
            self._days.append(np.sqrt(1 - self._drift) * self._days[-1] + np.sqrt(self._drift) * new)
        return self._days[day]


class World:
    """Users, items and the true probability of every task.

    The probabilities are those of any user and item, whether a log has shown them together or not:

    >>> world = World(PinadsConfig(num_users=50, num_items=40))
    >>> users, items = np.array([3, 3]), np.array([0, 39])
    >>> noon = np.full(2, 1_700_000_000)
    >>> contexts = Contexts(time=noon, surface=np.zeros(2, int), device=np.zeros(2, int), position=np.ones(2, int))
    >>> world.probability(users, items, contexts).shape  # click, good_click, outbound_click, save
    (2, 4)
    """

    def __init__(self, config: PinadsConfig) -> None:
        unknown = sorted(set(config.weights) - set(TERMS))
        if unknown:
            raise ValueError(f"weights: unknown term {unknown[0]!r}; known: {', '.join(TERMS)}")
        self.config = config
        self.users: Users = draw_users(config)
        self.items: Items = draw_items(config)
        self.weights = {
            term: weight for term, weight in {**WEIGHTS[config.truth], **config.weights}.items() if weight
        }
        self._draw_terms()
        self._standardise()

    def probability(self, users: Ints, items: Ints, contexts: Contexts) -> Floats:
        """True probabilities ``(n, 4)`` of TASKS.

        Good and outbound click are conditional on a click; click and save are of the impression. Given the
        impression, save is independent of the click, and outbound of good click.

        Args:
            users: ``(n,)`` rows of ``self.users`` (a log's ``user_id`` less 1).
            items: ``(n,)`` rows of ``self.items`` (see ``item_rows`` for a log's ``pin_id``).
            contexts: of length n.
        """
        return np.asarray(1.0 / (1.0 + np.exp(-self.logit(users, items, contexts))), dtype=np.float64)

    def logit(self, users: Ints, items: Ints, contexts: Contexts) -> Floats:
        """The log odds ``(n, 4)`` of :meth:`probability`."""
        logit = np.broadcast_to(self.bias, (len(users), len(TASKS))).copy()
        logit -= self.position_effect * np.log(np.maximum(contexts.position, 1))[:, None]
        for term, values in self.terms(users, items, contexts).items():
            logit += self.weights[term] * values
        return logit

    def terms(self, users: Ints, items: Ints, contexts: Contexts) -> dict[str, Floats]:
        """The standardised terms z ``(n, 4)`` by name, those with a weight only."""
        return {
            term: (self._raw(term, users, items, contexts) - self._mean[term]) / self._deviation[term]
            for term in self.weights
        }

    def item_rows(self, pin_ids: Ints) -> Ints:
        """Rows of ``self.items`` for a log's pin ids."""
        order = np.argsort(self.items.pin_id, kind="stable")
        return np.asarray(order[np.asarray(pin_ids, dtype=np.int64) - 1], dtype=np.int64)

    def traffic(self, rng: np.random.Generator, size: int) -> tuple[Ints, Ints, Contexts]:
        """Independent impressions of the world's traffic, all pins counted as arrived: users by activity."""
        users = pick(rng, self.users.activity, size)
        items = self.retrieve(rng, users, self.items.popularity)
        width = self.config.max_candidates
        contexts = Contexts(
            time=START + (rng.random(size) * 7 * DAY).astype(np.int64),
            surface=pick(rng, SURFACE_SHARES, size),
            device=np.where(rng.random(size) < 0.8, self.users.device[users], pick(rng, DEVICE_SHARES, size)),
            position=1 + np.floor(rng.random(size) * width).astype(np.int64),
        )
        return users, items, contexts

    def retrieve(self, rng: np.random.Generator, users: Ints, weight: Floats) -> Ints:
        """One candidate (row of ``items``) for each of ``users``: what an upstream retrieval would offer.

        Every second one on average comes from a category the user likes, the others from all pins; within
        either, pins are drawn by ``weight`` (0: not servable yet).
        """
        items = self.items
        upper = np.cumsum(weight)
        category = (self.users.category_shares[users].cumsum(axis=1) < rng.random((len(users), 1))).sum(
            axis=1
        )
        first = np.searchsorted(items.category, category, side="left")
        last = np.searchsorted(items.category, category, side="right")
        low = np.where(first > 0, upper[first - 1], 0.0)
        high = np.where(last > 0, upper[last - 1], 0.0)
        use = (rng.random(len(users)) < 0.5) & (high > low)
        low, high = np.where(use, low, 0.0), np.where(use, high, upper[-1])
        found = np.searchsorted(upper, low + (high - low) * rng.random(len(users)), side="right")
        return np.asarray(np.minimum(found, len(items) - 1), dtype=np.int64)

    # How the terms are drawn. Each has a stream of its own: turning one leaves the others as they are.

    def _draw_terms(self) -> None:
        seed, tasks = self.config.seed, len(TASKS)
        everything = np.ones((len(FIELDS), 1), dtype=np.bool_)
        self._main = self._additive(stream(seed, 3), everything, 1 + tasks)
        rng = stream(seed, 4)
        self._user_bias = rng.standard_normal((len(self.users), tasks))
        rng = stream(seed, 5)
        self._match = np.clip(0.6 + 0.5 * rng.standard_normal((TASTE, tasks)), -1.0, 1.0)
        rng = stream(seed, 6)
        self._pairs = self._products(rng, [2] * PAIRS, sharpness=1.0)
        self._pair_loadings = self._drifting_loadings(rng, PAIRS, 0)
        rng = stream(seed, 7)
        orders = [order for order, count in CROSSES.items() for _ in range(count)]
        self._crosses = self._products(rng, orders, CROSS_SHARPNESS)
        self._cross_loadings = self._drifting_loadings(rng, len(orders), 1)
        rng = stream(seed, 8)
        gate_fields = np.isin(FIELDS, GATE_FIELDS)[:, None]
        self._gate = self._additive(rng, gate_fields, INTENTS)
        self._gated = self._products(rng, list(GATED_ORDERS) * INTENTS, GATED_SHARPNESS)
        self._gated_loadings = self._drifting_loadings(rng, len(GATED_ORDERS) * INTENTS, 2)
        rng = stream(seed, 9)
        self._hidden = self._additive(rng, everything, HIDDEN)
        self._second = rng.standard_normal((HIDDEN, HIDDEN)) * (2.5 / np.sqrt(HIDDEN))
        self._dense_loadings = self._drifting_loadings(rng, HIDDEN, 3)
        number = len(self.items)
        self._quality = Drifting(
            self.items.quality, self.config.drift, lambda rng: rng.standard_normal(number), seed, 4
        )

    def _drifting_loadings(self, rng: np.random.Generator, width: int, key: int) -> Drifting:
        first = _loadings(rng, width)
        return Drifting(first, self.config.drift, lambda rng: _loadings(rng, width), self.config.seed, key)

    def _by_day(self, contexts: Contexts, work: Callable[[int, Ints], Floats]) -> Floats:
        """What ``work(day, rows)`` gives for the rows of each day, put together."""
        if not self.config.drift:
            return work(0, np.arange(len(contexts)))
        days, result = contexts.day, np.empty((len(contexts), len(TASKS)))
        for day in np.unique(days):
            rows = np.flatnonzero(days == day)
            result[rows] = work(int(day), rows)
        return result

    def _weighed(self, values: Floats, loadings: Drifting, contexts: Contexts) -> Floats:
        """``(n, J)`` values by their day's loadings, ``(n, 4)``."""
        return self._by_day(contexts, lambda day, rows: dot(values[rows], loadings.on(day)))

    def _raw(self, term: str, users: Ints, items: Ints, contexts: Contexts) -> Floats:
        at = (users, items, contexts)
        if term == "main":
            values = self._main(*at)
            raw = np.sqrt(1 - TASK_SHARE) * values[:, :1] + np.sqrt(TASK_SHARE) * values[:, 1:]
        elif term == "identity":
            raw = self._by_day(
                contexts,
                lambda day, rows: self._user_bias[users[rows]] + self._quality.on(day)[items[rows]][:, None],
            )
        elif term == "match":
            raw = dot(self.users.taste[users] * self.items.taste[items], self._match)
        elif term == "pairs":
            raw = self._weighed(self._pairs(*at), self._pair_loadings, contexts)
        elif term == "cross":
            crosses = (self._crosses(*at) - self._cross_mean) / self._cross_deviation
            raw = self._weighed(crosses, self._cross_loadings, contexts)
        elif term == "gated":
            gate = np.exp(GATE_SCALE * self._gate(*at))
            gate /= gate.sum(axis=1, keepdims=True)
            products = self._gated(*at) * np.repeat(gate, len(GATED_ORDERS), axis=1)
            raw = self._weighed(products, self._gated_loadings, contexts)
        else:
            hidden = np.tanh(1.5 * self._hidden(*at))
            raw = self._weighed(np.tanh(dot(hidden, self._second)), self._dense_loadings, contexts)
        return np.asarray(raw, dtype=np.float64)

    def _standardise(self) -> None:
        users, items, contexts = self.traffic(stream(self.config.seed, 10), TRAFFIC)
        # Products of more factors vary more; each counts the same within the term.
        crosses = self._crosses(users, items, contexts)
        self._cross_mean, self._cross_deviation = crosses.mean(axis=0), crosses.std(axis=0) + 1e-12
        self._mean, self._deviation = {}, {}
        for term in self.weights:
            raw = self._raw(term, users, items, contexts)
            self._mean[term], self._deviation[term] = raw.mean(axis=0), raw.std(axis=0) + 1e-12
        self.position_effect = self.config.position_effect * np.array([1.0, 0.0, 0.0, 1.0])
        self.bias = np.zeros(len(TASKS))
        logit = self.logit(users, items, contexts)
        click = _rates(logit[:, :1], np.ones((len(logit), 1)), np.array(self.config.rates[:1]))
        # The rates of good and outbound click are shares of the clicks: weigh by the click's probability.
        weight = np.ones_like(logit)
        weight[:, 1:3] = 1.0 / (1.0 + np.exp(-(logit[:, :1] + click)))
        self.bias = _rates(logit, weight, np.array(self.config.rates))

    def _additive(self, rng: np.random.Generator, used: np.ndarray, width: int) -> Split:
        """Sums of xi_f over the used fields, of deviation 1."""
        draws = self._draw_fields(rng, width)
        scale = 1.0 / np.sqrt(used.sum())
        parts = [scale * flag * draw for flag, draw in zip(used[:, 0], draws, strict=True)]
        u, i = len(USER_FIELDS), len(USER_FIELDS) + len(ITEM_FIELDS)
        return Split(
            users=np.sum(parts[:u], axis=0, dtype=np.float32),
            items=np.sum(parts[u:i], axis=0, dtype=np.float32),
            contexts=tuple(np.asarray(part, dtype=np.float32) for part in parts[i:]),
            product=False,
        )

    def _products(self, rng: np.random.Generator, orders: list[int], sharpness: float) -> Split:
        """Products of ``orders[j]`` fields' factors, one field at least the user's and one the item's."""
        member = np.zeros((len(FIELDS), len(orders)), dtype=np.bool_)
        u, i = len(USER_FIELDS), len(USER_FIELDS) + len(ITEM_FIELDS)
        for j, order in enumerate(orders):
            user, item = int(rng.random() * u), u + int(rng.random() * (i - u))
            others = [field for field in np.argsort(rng.random(len(FIELDS))) if field not in (user, item)]
            member[[user, item, *others[: order - 2]], j] = True
        draws = self._draw_fields(rng, len(orders))
        low, high = np.sqrt(1 - sharpness), np.sqrt(sharpness)
        parts = [np.where(flag, low + high * draw, 1.0) for flag, draw in zip(member, draws, strict=True)]
        return Split(
            users=np.prod(parts[:u], axis=0, dtype=np.float32),
            items=np.prod(parts[u:i], axis=0, dtype=np.float32),
            contexts=tuple(np.asarray(part, dtype=np.float32) for part in parts[i:]),
            product=True,
        )

    def _draw_fields(self, rng: np.random.Generator, width: int) -> list[Floats]:
        """xi_f for each of FIELDS: ``(users, width)``, ``(items, width)`` or ``(values, width)``."""
        users, items = self.users, self.items
        by_user, by_item = users.activity, items.popularity

        def table(values: int) -> Floats:
            # Bounded draws: no single value of a field dominates a product.
            return np.asarray(np.sqrt(3.0) * (2.0 * rng.random((values, width)) - 1.0), dtype=np.float64)

        def smooth(inputs: Floats) -> Floats:
            inputs = (inputs - inputs.mean(axis=0)) / (inputs.std(axis=0) + 1e-12)
            direction = rng.standard_normal((inputs.shape[1], width))
            direction /= np.sqrt((direction**2).sum(axis=0))
            return np.asarray(np.tanh(1.5 * dot(inputs, direction) + 0.5 * rng.standard_normal(width)))

        return [
            _unit(table(len(AGE_GROUPS))[users.age], by_user),
            _unit(table(len(GENDERS))[users.gender], by_user),
            _unit(table(len(COUNTRIES))[users.country], by_user),
            _unit(smooth(np.log1p(users.tenure_days)[:, None]), by_user),
            _unit(smooth(users.taste), by_user),
            _unit(table(len(CATEGORIES))[items.category], by_item),
            _unit(table(len(FORMATS))[items.format], by_item),
            _unit(table(self.config.num_advertisers)[items.advertiser], by_item),
            _unit(smooth(np.log(items.price)[:, None]), by_item),
            _unit(smooth(items.taste), by_item),
            _unit(table(len(SURFACES)), np.array(SURFACE_SHARES)),
            _unit(table(len(DEVICES)), np.array(DEVICE_SHARES)),
            # A value for each hour, changing slowly: the first two harmonics of the day.
            _unit(dot(_harmonics(), rng.standard_normal((4, width))), np.ones(24)),
            _unit(table(7), np.ones(7)),
        ]


def _harmonics() -> Floats:
    angle = 2.0 * np.pi * np.arange(24) / 24.0
    return np.stack([np.sin(angle), np.cos(angle), np.sin(2 * angle), np.cos(2 * angle)], axis=1)


def _unit(values: Floats, weight: Floats) -> Floats:
    """Mean 0 and deviation 1 in each column under these weights."""
    share = weight / weight.sum()
    centred = values - (share[:, None] * values).sum(axis=0)
    return np.asarray(centred / np.sqrt((share[:, None] * centred**2).sum(axis=0) + 1e-12), dtype=np.float64)


def _loadings(rng: np.random.Generator, width: int) -> Floats:
    """How much each of ``width`` values counts for each task: common to the tasks in part."""
    common = rng.standard_normal((width, 1))
    own = rng.standard_normal((width, len(TASKS)))
    return np.asarray(np.sqrt(1 - TASK_SHARE) * common + np.sqrt(TASK_SHARE) * own, dtype=np.float64)


def _rates(logit: Floats, weight: Floats, target: Floats) -> Floats:
    """The bias of each column that makes its weighted mean probability the target (bisection)."""
    low, high = np.full(logit.shape[1], -30.0), np.full(logit.shape[1], 30.0)
    for _ in range(45):
        middle = (low + high) / 2
        mean = (weight / (1.0 + np.exp(-(logit + middle)))).sum(axis=0) / weight.sum(axis=0)
        low, high = np.where(mean < target, middle, low), np.where(mean < target, high, middle)
    return np.asarray((low + high) / 2, dtype=np.float64)
