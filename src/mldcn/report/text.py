"""Texts and numbers as a reader sees them: escaped, rounded, with a dash where nothing is known."""

from __future__ import annotations

import html
import math
import re

DASH = "–"

# What neither HTML nor XML may hold: control characters, surrogates and the two non-characters.
_FORBIDDEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff\ufffe\uffff]")
_MARKDOWN = re.compile(r"([\\`*_\[\]|~])")
_SUFFIXES = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def clean(text: str) -> str:
    """The text, with a replacement character for what HTML and XML cannot hold."""
    return _FORBIDDEN.sub("\ufffd", text)


def escape(text: str) -> str:
    """The text for HTML, in an element or an attribute."""
    return html.escape(clean(text), quote=True)


def escape_markdown(text: str) -> str:
    """The text for one line of Markdown, or one cell of its tables."""
    text = " ".join(clean(text).split())
    return _MARKDOWN.sub(r"\\\1", html.escape(text, quote=False))


def shorten(text: str, width: int) -> str:
    """The text cut to ``width`` characters, for a label in a plot."""
    text = " ".join(clean(text).split())
    return text if len(text) <= width else text[: width - 1].rstrip() + "…"


def known(value: float | int | None) -> bool:
    """Whether there is a finite number to show."""
    return value is not None and math.isfinite(value)


def number(value: float | int | None, spec: str = "") -> str:
    """A number for people.

    Args:
        value: what to show; None and NaN are shown as a dash.
        spec: a Python format; ``si`` (131k, 4.40M), ``tick`` (the same, 4.4M), ``duration`` (2 min 5 s), ``p`` (a
            p-value), ``signed`` (+0.001, and 0) or, where it is empty, thousands separated for an integer and
            four digits for a float.
    """
    if value is None or math.isnan(value):
        return DASH
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    if spec in ("si", "tick"):
        text = _si(value, short=spec == "tick")
    elif spec == "duration":
        text = _duration(value)
    elif spec == "signed":
        text = f"{value:+.3g}" if abs(value) > 1e-12 else "0"
    elif spec == "p":
        text = "<0.001" if value < 0.001 else f"{value:.3f}"
    else:
        text = format(value, spec or (",d" if isinstance(value, int) else ".4g"))
    return text.replace("-", "−") if spec != "p" else text


def _si(value: float, *, short: bool) -> str:
    for scale, suffix in _SUFFIXES:
        # 999.6 would be rounded to 1000: that is 1 of the next suffix.
        if abs(value) >= scale * 0.9995:
            return f"{_three_digits(value / scale, short=short)}{suffix}"
    return _three_digits(value, short=True)


def _three_digits(value: float, *, short: bool) -> str:
    digits = 0 if abs(value) >= 99.95 else 1 if abs(value) >= 9.995 else 2
    text = f"{value:.{digits}f}"
    return text.rstrip("0").rstrip(".") if short and "." in text else text


def _duration(seconds: float) -> str:
    if seconds < 59.95:
        return f"{_three_digits(seconds, short=True)} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours:,} h {minutes} min"


def percent(share: float) -> str:
    """A share such as an interval's level: 95%, 97.5%."""
    return f"{100 * share:g}%"


def slug(text: str) -> str:
    """A file name's part made of a text: lower-case letters, digits and hyphens."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "x"
