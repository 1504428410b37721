"""Commands about logs: ``mldcn data ...``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mldcn.cli.arguments import ConfigFile, Settings


def encode(
    config: ConfigFile,
    out: Annotated[
        Path | None, typer.Option(help="folder; by default the one that 'mldcn fit' looks for in runs/")
    ] = None,
    settings: Settings = [],  # noqa: B006
) -> None:
    """Encodes a config's log and trains nothing; started again, it goes on where it was interrupted.

    Example: mldcn data encode mldcn.yaml --set data.memory_mb=4096
    """
    from mldcn import workflow
    from mldcn.config import load_config
    from mldcn.console import EncodingProgress, warn_of_rejects
    from mldcn.console import out as screen
    from mldcn.data.prepare import REJECTS

    progress = EncodingProgress()
    try:
        folder, data = workflow.encode(load_config(config, settings), out, progress)
    finally:
        progress.close()
    warn_of_rejects(data.rejected, None, folder / REJECTS)
    parts = {"training": data.train, "validation": data.valid, "test": data.test}
    counts = ", ".join(f"{len(rows):,} {part} rows" for part, rows in parts.items() if rows is not None)
    had = " (they were there already)" if data.reused else ""
    screen.print(f"{folder}: {counts}{had}", markup=False)


def list_logs() -> None:
    """Lists the logs that mldcn knows by name.

    Example: mldcn data list
    """
    from mldcn.console import table
    from mldcn.datasets import list_datasets

    rows = [[d.name, d.title, d.licence, "yes" if d.downloadable else "by hand"] for d in list_datasets()]
    table("named logs", ["name", "what", "licence", "download"], rows)


def describe(name: Annotated[str, typer.Argument(help="a log's name")]) -> None:
    """Shows a named log's licence, citation and how to get it.

    Example: mldcn data describe movielens-1m
    """
    from mldcn.console import out as screen
    from mldcn.datasets import dataset

    screen.print(dataset(name).describe(), markup=False)


def fetch(
    name: Annotated[str, typer.Argument(help="a log's name")],
    out: Annotated[Path, typer.Option(help="folder for the log and its config")] = Path("data"),
    source: Annotated[
        Path | None, typer.Option(help="your own download: the file or folder; nothing is fetched then")
    ] = None,
    rows: Annotated[int | None, typer.Option(min=1000, help="impressions, for pinads")] = None,
) -> None:
    """Fetches a named log (or takes your download) and writes a log and a config that 'mldcn fit' reads.

    Example: mldcn data fetch movielens-1m --source ml-1m.zip
    """
    from mldcn import workflow
    from mldcn.console import out as screen
    from mldcn.datasets import dataset

    config = workflow.fetch(name, out, source, rows)
    screen.print(dataset(name).describe(), markup=False)
    screen.print(f"wrote {config}\nnext:\n  mldcn describe {config}\n  mldcn fit {config}", markup=False)
