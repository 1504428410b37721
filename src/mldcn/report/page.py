"""A self-contained HTML page, its blocks also as Markdown and CSV.

It loads no script, font or picture from anywhere.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import Self

from mldcn.files import write_text
from mldcn.report.blocks import Block, Details, Figure, Figures, Heading
from mldcn.report.table import Table
from mldcn.report.text import escape, escape_markdown

# A browser that follows it loads nothing and runs nothing, whatever a text might smuggle in.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"


class Page:
    """A page of blocks in their order.

    Args:
        title: the page's heading, and its name in the browser.
        subtitle: a line below it.
        footer: a line at the page's end, such as what made it.

    Example:
        >>> from mldcn.report.blocks import Paragraph
        >>> page = Page("Two runs").add(Paragraph("A is no better than B."))
        >>> "<h1>Two runs</h1>" in page.to_html()
        True
    """

    def __init__(self, title: str, *, subtitle: str = "", footer: str = "") -> None:
        self.title = title
        self.subtitle = subtitle
        self.footer = footer
        self.blocks: list[Block] = []

    def add(self, *blocks: Block) -> Self:
        """Adds blocks at the end."""
        self.blocks += blocks
        return self

    @property
    def tables(self) -> list[Table]:
        """The page's tables, folded ones too."""
        return [block for block in _walk(self.blocks) if isinstance(block, Table)]

    @property
    def figures(self) -> list[Figure]:
        """The page's pictures, folded ones too."""
        return [block for block in _walk(self.blocks) if isinstance(block, Figure)]

    def to_html(self) -> str:
        """The page as one HTML document. The same blocks give the same bytes."""
        style = resources.files("mldcn.report").joinpath("page.css").read_text(encoding="utf-8")
        subtitle = f'\n<p class="subtitle">{escape(self.subtitle)}</p>' if self.subtitle else ""
        footer = f"\n<footer>{escape(self.footer)}</footer>" if self.footer else ""
        body = "\n".join(block.html(f"b{i}") for i, block in enumerate(self.blocks))
        return (
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            '<meta name="color-scheme" content="light dark">\n'
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
            f"<title>{escape(self.title)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n"
            f"<header>\n<h1>{escape(self.title)}</h1>{subtitle}{self._contents()}\n</header>\n"
            f"<main>\n{body}\n</main>{footer}\n</body>\n</html>\n"
        )

    def to_markdown(self) -> str:
        """The same page as Markdown; its pictures are links to files that :meth:`write_files` writes."""
        parts = [f"# {escape_markdown(self.title)}", escape_markdown(self.subtitle)]
        parts += [block.markdown() for block in self.blocks]
        parts.append(escape_markdown(self.footer))
        return "\n\n".join(part for part in parts if part) + "\n"

    def write(self, path: str | Path) -> Path:
        """Writes the HTML page atomically: a reader sees the old page or the new one."""
        write_text(Path(path), self.to_html())
        return Path(path)

    def write_files(self, folder: str | Path, name: str = "report") -> list[Path]:
        """Writes the page as ``<name>.md`` with its tables as CSV and its pictures as SVG beside it."""
        texts = {f"{name}.md": self.to_markdown()}
        texts |= {f"{name}.csv": table.csv() for name, table in _named(self.tables)}
        texts |= {f"{figure.name}.svg": figure.svg + "\n" for figure in self.figures}
        paths = [Path(folder) / name for name in texts]
        for path, text in zip(paths, texts.values(), strict=True):
            write_text(path, text)
        return paths

    def _contents(self) -> str:
        headings = [(i, b) for i, b in enumerate(self.blocks) if isinstance(b, Heading) and b.level == 2]
        if len(headings) < 3:  # a short page needs no list of contents
            return ""
        links = "".join(f'<li><a href="#b{i}">{escape(heading.text)}</a></li>' for i, heading in headings)
        return f'\n<nav aria-label="Contents"><ul>{links}</ul></nav>'


def _walk(blocks: Sequence[Block]) -> Iterator[Block]:
    for block in blocks:
        yield block
        if isinstance(block, Details):
            yield from _walk(block.blocks)
        elif isinstance(block, Figures):
            yield from block.figures


def _named(tables: Sequence[Table]) -> Iterator[tuple[str, Table]]:
    """The tables with file names; one that was taken gets a number."""
    seen: dict[str, int] = {}
    for table in tables:
        seen[table.name] = seen.get(table.name, 0) + 1
        count = seen[table.name]
        yield (table.name if count == 1 else f"{table.name}-{count}"), table
