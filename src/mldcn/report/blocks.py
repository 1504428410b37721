"""What a page is built from. Each block gives itself as HTML and as Markdown; texts are escaped here."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from mldcn.report.text import clean, escape, escape_markdown


class Block(Protocol):
    """A part of a page. ``key`` is unique on the page, and the start of every id that the block uses."""

    def html(self, key: str) -> str:
        """The block as HTML."""
        ...

    def markdown(self) -> str:
        """The block as Markdown."""
        ...


@dataclass(frozen=True)
class Heading:
    """A heading; those of level 2 make up the page's list of contents."""

    text: str
    level: Literal[2, 3] = 2

    def html(self, key: str) -> str:
        """The block as HTML."""
        return f'<h{self.level} id="{key}">{escape(self.text)}</h{self.level}>'

    def markdown(self) -> str:
        """The block as Markdown."""
        return f"{'#' * self.level} {escape_markdown(self.text)}"


@dataclass(frozen=True)
class Paragraph:
    """Plain text."""

    text: str

    def html(self, key: str) -> str:
        """The block as HTML."""
        return f"<p>{escape(self.text)}</p>"

    def markdown(self) -> str:
        """The block as Markdown."""
        return escape_markdown(self.text)


@dataclass(frozen=True)
class Bullets:
    """A list of plain texts."""

    items: Sequence[str]

    def html(self, key: str) -> str:
        """The block as HTML."""
        return '<ul class="list">' + "".join(f"<li>{escape(item)}</li>" for item in self.items) + "</ul>"

    def markdown(self) -> str:
        """The block as Markdown."""
        return "\n".join(f"- {escape_markdown(item)}" for item in self.items)


@dataclass(frozen=True)
class Code:
    """A text whose lines and spaces matter: a command or a config."""

    text: str

    def html(self, key: str) -> str:
        """The block as HTML."""
        return f'<pre tabindex="0"><code>{escape(self.text)}</code></pre>'

    def markdown(self) -> str:
        """The block as Markdown, fenced by more backticks than the text has in a row."""
        longest = max((len(run) for run in re.findall("`+", self.text)), default=0)
        fence = "`" * max(3, longest + 1)
        return f"{fence}\n{clean(self.text).rstrip()}\n{fence}"


@dataclass(frozen=True)
class KeyValues:
    """Names and what they are."""

    items: Sequence[tuple[str, str]]

    def html(self, key: str) -> str:
        """The block as HTML."""
        return "<dl>" + "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in self.items) + "</dl>"

    def markdown(self) -> str:
        """The block as Markdown."""
        return "\n".join(f"- {escape_markdown(k)}: {escape_markdown(v)}" for k, v in self.items)


@dataclass(frozen=True)
class Callout:
    """A box that stands out: the finding, a warning, or what to do next with its commands."""

    title: str
    text: str = ""
    kind: Literal["note", "next", "warning"] = "note"
    commands: Sequence[str] = ()

    def html(self, key: str) -> str:
        """The block as HTML."""
        text = f"<p>{escape(self.text)}</p>" if self.text else ""
        commands = "".join(Code(command).html(key) for command in self.commands)
        title = f'<p class="title">{escape(self.title)}</p>'
        return f'<div class="callout {self.kind}" role="note">{title}{text}{commands}</div>'

    def markdown(self) -> str:
        """The block as Markdown."""
        title = f"**{escape_markdown(self.title)}**"
        parts = [title, escape_markdown(self.text), *(Code(command).markdown() for command in self.commands)]
        text = "\n\n".join(part for part in parts if part)
        return "\n".join(f"> {line}".rstrip() for line in text.splitlines())


@dataclass(frozen=True)
class Details:
    """Blocks that stay folded until the reader opens them."""

    summary: str
    blocks: Sequence[Block]

    def html(self, key: str) -> str:
        """The block as HTML."""
        inner = "\n".join(block.html(f"{key}-{i}") for i, block in enumerate(self.blocks))
        return f"<details><summary>{escape(self.summary)}</summary>\n{inner}\n</details>"

    def markdown(self) -> str:
        """The block as Markdown, with the HTML that GitHub folds."""
        inner = "\n\n".join(block.markdown() for block in self.blocks)
        return f"<details><summary>{escape(self.summary)}</summary>\n\n{inner}\n\n</details>"


@dataclass(frozen=True)
class Figure:
    """A picture.

    Args:
        name: of the picture's file, where the page's pictures are written out.
        svg: the picture, as :func:`mldcn.report.plots.to_svg` gives it. It is not escaped.
        title: its heading.
        alt: what it shows, for those who cannot see it.
        caption: how to read it.

    Raises:
        ValueError: ``svg`` is no SVG element.
    """

    name: str
    svg: str
    title: str
    alt: str
    caption: str = ""

    def __post_init__(self) -> None:
        if not self.svg.startswith("<svg "):
            raise ValueError(f"figure {self.name!r}: expected an <svg> element, found {self.svg[:20]!r}")

    def html(self, key: str) -> str:
        """The block as HTML, the picture inside it; its ids are made unique on the page."""
        svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\1{key}-", self.svg)
        svg = f'<svg role="img" aria-label="{escape(self.alt)}" ' + svg.removeprefix("<svg ")
        return f"<figure>{svg}<figcaption><b>{escape(self.title)}</b>{escape(self.caption)}</figcaption></figure>"

    def markdown(self) -> str:
        """The block as Markdown: a link to the picture's file beside the page."""
        text = f"![{escape_markdown(self.alt)}]({self.name}.svg)\n\n*{escape_markdown(self.title)}*"
        return f"{text} {escape_markdown(self.caption)}".rstrip()


@dataclass(frozen=True)
class Figures:
    """Pictures side by side where the screen is wide enough."""

    figures: Sequence[Figure]

    def html(self, key: str) -> str:
        """The block as HTML."""
        inner = "\n".join(figure.html(f"{key}-{i}") for i, figure in enumerate(self.figures))
        return f'<div class="figures">\n{inner}\n</div>'

    def markdown(self) -> str:
        """The block as Markdown."""
        return "\n\n".join(figure.markdown() for figure in self.figures)
