"""The command line: one thin layer over the Python API; a command is a call."""

from __future__ import annotations

import os
import sys
import traceback
from typing import Annotated

import typer

from mldcn import __version__
from mldcn.cli import loadtest, logs, runs, serving, studies
from mldcn.errors import UserError

app = typer.Typer(
    name="mldcn",
    help="Train, evaluate and compare ranking models (ML-DCN and its rivals) on a log of impressions.",
    no_args_is_help=True,
    # Plain text: to load Rich for its colours would take longer than all the rest of --help.
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
data_app = typer.Typer(help="Named logs: what they are, fetching, preparing.", no_args_is_help=True)
app.add_typer(data_app, name="data")


def main() -> None:
    """Runs the command line; a mistake ends in a message and exit code 1, without a traceback."""
    try:
        app()
    except UserError as error:
        fail(str(error))
    except KeyboardInterrupt as interrupt:
        fail(str(interrupt) or "interrupted", code=130)
    except BrokenPipeError:
        # Whoever read the output has seen enough; Python would complain once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        from mldcn.files import no_room

        remedy = "; free some space and run the command again" if no_room(error) else ""
        fail(f"{error.filename or 'system'}: {error.strerror or error}{remedy}")
    except Exception as error:
        fail(f"internal error, {type(error).__name__}: {error}; please report what --traceback shows")


def fail(message: str, code: int = 1) -> None:
    """Prints an error (and, with MLDCN_TRACEBACK=1, where it arose) and exits."""
    if os.environ.get("MLDCN_TRACEBACK"):
        traceback.print_exc()
    sys.stderr.write(f"mldcn: {message}\n")
    sys.exit(code)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"mldcn {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="show the version")
    ] = False,
    show_traceback: Annotated[
        bool, typer.Option("--traceback", help="show where an error arose, for a bug report")
    ] = False,
) -> None:
    if show_traceback:
        os.environ["MLDCN_TRACEBACK"] = "1"


for command in (
    runs.init,
    runs.describe,
    runs.fit,
    runs.evaluate,
    runs.predict,
    serving.export,
    serving.upload,
    serving.serve,
    loadtest.loadtest,
    studies.compare,
    studies.explain,
    studies.models,
    studies.cost,
    studies.demo,
    studies.study,
):
    app.command()(command)
data_app.command("encode")(logs.encode)
data_app.command("list")(logs.list_logs)
data_app.command("describe")(logs.describe)
data_app.command("fetch")(logs.fetch)
