"""Turning widths until a cost meets a budget."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch

from mldcn import interactions
from mldcn.cost.flops import meta
from mldcn.errors import UserError
from mldcn.interactions import Interaction
from mldcn.layout import FieldLayout, as_layout

TOLERANCE = 0.01  # of models that are called equal
CLOSE_ENOUGH = 0.005  # by the first dial alone
MAX_WIDTH = 1 << 20  # no model here is wider; beyond it a budget cannot be met by a width
NEIGHBOURS = 128  # widths looked at on either side of one that an architecture refuses
BASES = 4  # settings of the coarser dials that a finer one is tried on
FINER_RANGE = 4  # a finer dial is turned by at most this factor

Subject = TypeVar("Subject")


@dataclass(frozen=True)
class Dial(Generic[Subject]):
    """A width that can be turned.

    name: as messages call it. start: where it stands. turn: the subject with another width. free: it has no
    width of its own yet (one that follows others), and start is only where to begin.
    """

    name: str
    start: int
    turn: Callable[[Subject, int], Subject]
    free: bool = False


@dataclass(frozen=True)
class Found(Generic[Subject]):
    """A subject and its cost. residual: ``cost / budget - 1``. settings: the widths that were turned."""

    subject: Subject
    cost: float
    residual: float
    settings: dict[str, int]


def solve(
    subject: Subject,
    dials: Sequence[Dial[Subject]],
    cost: Callable[[Subject], float],
    budget: float,
    *,
    tolerance: float = TOLERANCE,
    close: float = 0.0,
    what: str = "FLOPs per example",
) -> Found[Subject]:
    """The setting of dials whose cost is nearest to a budget.

    Costs grow with every dial, so a search between a setting too low and one too high finds it. The first
    dial is turned alone; where its steps are too coarse, the next ones take up what they leave over.

    Args:
        subject: what is turned. As it is, it is returned where it meets the budget already.
        dials: its widths, the one to turn first in front.
        cost: of a subject; a UserError says that a setting is not possible.
        budget: the cost to meet.
        tolerance: the largest share by which the cost may miss the budget.
        close: a miss at which the search ends; 0 looks for the nearest.
        what: the cost's unit, for messages.

    Raises:
        UserError: no setting comes within the tolerance; the nearest is named.
    """
    if not budget > 0:
        raise UserError(f"a budget of {budget:,.6g} {what} cannot be met; it must be above 0")
    own = cost(subject)
    best = [Found(subject, own, own / budget - 1, {})]
    good = min(max(close, CLOSE_ENOUGH), tolerance)
    if abs(best[0].residual) > close:
        for finer, dial in enumerate(dials):
            if finer and abs(best[0].residual) <= good:
                break
            bound = finer and not dial.free
            reach = (dial.start // FINER_RANGE, dial.start * FINER_RANGE) if bound else (1, MAX_WIDTH)
            for base in best[:BASES]:
                best = sorted([*best, *_Search(base, dial, cost, budget, close, reach).run()], key=_miss)
                if finer and abs(best[0].residual) <= good:
                    break
    if abs(best[0].residual) > tolerance:
        raise UserError(_refusal(dials, best[0], budget, tolerance, what))
    return best[0]


def _miss(found: Found[Any]) -> float:
    return abs(found.residual)


def _refusal(
    dials: Sequence[Dial[Any]], nearest: Found[Any], budget: float, tolerance: float, what: str
) -> str:
    names = [dial.name for dial in dials]
    settings = ", ".join(f"{name} {value}" for name, value in nearest.settings.items()) or "as it is"
    problem = f"no {' and '.join(names)} comes" if names else "there is no width to turn that comes"
    number = ",.0f" if budget >= 100 else ",.4g"
    bounded = [dial.name for dial in dials[1:] if not dial.free]
    bound = f", {' and '.join(bounded)} turned by at most {FINER_RANGE} times" if bounded else ""
    return (
        f"{problem} within {tolerance:.1%} of {budget:{number}} {what}; the nearest, {settings}, has "
        f"{nearest.cost:{number}} ({nearest.residual:+.1%}){bound}"
    )


class _Search(Generic[Subject]):
    """Turns one dial of one subject. Some widths may be impossible (not a multiple of the heads, say)."""

    def __init__(
        self,
        base: Found[Subject],
        dial: Dial[Subject],
        cost: Callable[[Subject], float],
        budget: float,
        close: float,
        reach: tuple[int, int],
    ) -> None:
        self.base, self.dial, self.cost, self.budget, self.close = base, dial, cost, budget, close
        self.lowest, self.highest = max(1, reach[0]), min(MAX_WIDTH, reach[1])
        self.below: tuple[int, Found[Subject]] | None = None
        self.above: tuple[int, Found[Subject]] | None = None
        self.tried: dict[int, Found[Subject] | None] = {}

    def run(self) -> list[Found[Subject]]:
        """Everything that was tried, the nearest settings on either side of the budget among it."""
        self._bracket()
        while not self._ended():
            low = self.below[0] if self.below else self.lowest - 1
            high = self.above[0] if self.above else self.highest + 1
            if high - low <= 1 or not self._try_near(self._guess(low, high), low, high):
                break
        return [found for found in self.tried.values() if found is not None]

    def _bracket(self) -> None:
        """Doubles or halves the width until there is one on either side of the budget, or no more widths."""
        value = min(max(self.dial.start, self.lowest), self.highest)
        self._try_near(value, self.lowest - 1, self.highest + 1)
        while self.above is None and self.below is not None and 2 * self.below[0] <= self.highest:
            if not self._try_near(2 * self.below[0], self.below[0], self.highest + 1):
                return
        while self.below is None and self.above is not None and self.above[0] // 2 >= self.lowest:
            if not self._try_near(self.above[0] // 2, self.lowest - 1, self.above[0]):
                return

    def _ended(self) -> bool:
        near = [abs(end[1].residual) for end in (self.below, self.above) if end is not None]
        return not near or min(near) <= self.close

    def _guess(self, low: int, high: int) -> int:
        """Where a straight line between both ends meets the budget; now and then the middle, to be sure."""
        middle = (low + high) // 2
        if self.below is None or self.above is None or len(self.tried) % 4 == 3:
            return middle
        (a, under), (b, over) = self.below, self.above
        if over.cost <= under.cost:
            return middle
        return a + round((b - a) * (self.budget - under.cost) / (over.cost - under.cost))

    def _try_near(self, value: int, low: int, high: int) -> bool:
        """Tries the possible width nearest to a value, strictly between two others."""
        value = min(max(value, low + 1), high - 1)
        for step in range(NEIGHBOURS + 1):
            for each in dict.fromkeys((value + step, value - step)):
                if low < each < high and self._try(each):
                    return True
        return False

    def _try(self, value: int) -> bool:
        if value not in self.tried:
            self.tried[value] = self._found(value)
        found = self.tried[value]
        if found is None:
            return False
        if found.cost < self.budget:
            self.below = (value, found)
        else:
            self.above = (value, found)
        return True

    def _found(self, value: int) -> Found[Subject] | None:
        subject = self.dial.turn(self.base.subject, value)
        try:
            cost = self.cost(subject)
        except UserError:
            return None
        settings = {**self.base.settings, self.dial.name: value}
        return Found(subject, cost, cost / self.budget - 1, settings)


@dataclass(frozen=True)
class Solution:
    """An architecture whose cost meets a budget.

    options: its config as a mapping, ``name`` included. residual: ``cost / budget - 1``. settings: the
    options that were turned; of a stack of widths, the first.
    """

    options: dict[str, Any]
    cost: float
    residual: float
    settings: dict[str, int]


def interaction_flops(module: Interaction) -> int:
    """GEMM FLOPs per example."""
    return module.flops()


def interaction_parameters(module: Interaction) -> int:
    """The number of parameters."""
    return sum(parameter.numel() for parameter in module.parameters())


def solve_width(
    name: str,
    features: int | FieldLayout,
    budget: float,
    options: Mapping[str, Any] | None = None,
    knob: str | None = None,
    *,
    tolerance: float = TOLERANCE,
    cost: Callable[[Interaction], float] = interaction_flops,
    what: str = "FLOPs per example",
    device: str = "meta",
    close: float = 0.0,
) -> Solution:
    """The width of an architecture whose cost is nearest to a budget.

    Turns the architecture's own width knob, and its secondary one where the first's steps are coarse. A knob
    that holds several widths (the DNN's ``hidden``) keeps their proportions.

    Args:
        name: the architecture.
        features: width of ``x0``, or its layout.
        budget: the cost to meet.
        options: the architecture's other options.
        knob: the only option to turn; the architecture's own by default.
        tolerance: the largest share by which the cost may miss the budget.
        cost: of a module: :func:`interaction_flops`, :func:`interaction_parameters`, or a measured time.
        what: its unit, for messages.
        device: where modules are built; nothing is computed or allocated on ``meta``.
        close: a miss at which the search ends, for costs that are measured; 0 looks for the nearest.

    Raises:
        UserError: there is no such option, it is no width, or no value comes within the tolerance.

    Example:
        >>> solution = solve_width("dcnv2_lowrank", 416, 1_000_000, {"num_layers": 3})
        >>> solution.settings, solution.cost
        ({'rank': 200}, 998400)
    """
    base = {**(options or {}), "name": name}
    dials = option_dials(base, as_layout(features).width, knob)
    if not dials:
        raise UserError(f"interaction {name}: there is no width to turn")

    def of(spec: Mapping[str, Any]) -> float:
        with meta() if device == "meta" else torch.device(device):
            return cost(interactions.build(spec, features))

    try:
        found = solve(base, dials, of, budget, tolerance=tolerance, close=close, what=what)
    except UserError as error:
        raise UserError(_named(name, error)) from None
    return Solution(dict(found.subject), found.cost, found.residual, found.settings)


def _named(name: str, error: UserError) -> str:
    text = str(error)
    return text if text.startswith("interaction") else f"interaction {name}: {text}"


def option_dials(spec: Mapping[str, Any], width: int, knob: str | None = None) -> list[Dial[dict[str, Any]]]:
    """The dials of an architecture: those of its width knob and its secondary one, as far as it has them.

    Args:
        spec: the architecture's options, ``name`` included.
        width: where an option starts that is not set: as wide as what comes in.
        knob: the only option to turn.

    Raises:
        UserError: there is no such option, or it is no width.
    """
    name, config = spec["name"], interactions.parse(spec)
    if knob is not None:
        if knob not in type(config).model_fields:
            raise UserError(f"interaction {name}: there is no width to turn called {knob!r}")
        if not _widths(getattr(config, knob), width):
            shape = getattr(config, knob)
            raise UserError(f"interaction {name}: {knob} is no width to turn (it is {shape!r})")
        names = [knob]
    else:
        known = interactions.info(name)
        names = [each for each in (known.knob, known.secondary) if each]
    # An empty stack of widths is a part that is not there, with nothing to turn.
    return [
        _option_dial(each, getattr(config, each), width)
        for each in names
        if _widths(getattr(config, each), width)
    ]


def _widths(shape: Any, width: int) -> tuple[int, ...]:
    """The widths that an option holds: none where it is something else."""
    shape = width if shape is None else shape
    widths = shape if isinstance(shape, tuple) else (shape,)
    whole = all(isinstance(each, int) and not isinstance(each, bool) for each in widths)
    return widths if whole else ()


def _option_dial(option: str, shape: Any, width: int) -> Dial[dict[str, Any]]:
    widths = _widths(shape, width)

    def turn(many: bool, subject: Mapping[str, Any], value: int) -> dict[str, Any]:
        scaled = tuple(max(1, round(each * value / widths[0])) for each in widths)
        return {**subject, option: scaled if many else scaled[0]}

    return Dial(option, widths[0], functools.partial(turn, isinstance(shape, tuple)), shape is None)
