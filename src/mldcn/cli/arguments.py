"""Arguments that several commands take."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

ConfigFile = Annotated[Path, typer.Argument(help="the YAML file that 'mldcn init' wrote", show_default=False)]
RunPath = Annotated[Path, typer.Argument(help="a run's folder", show_default=False)]
RejectsPath = Annotated[
    Path | None,
    typer.Option("--rejects", help="a .csv for the log's bad rows, where data.on_error is skip"),
]
Settings = Annotated[
    list[str], typer.Option("--set", metavar="KEY=VALUE", help="change a config key, e.g. training.epochs=3")
]
