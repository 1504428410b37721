"""The house's one rule: a room imports only from rooms above it."""

import ast
from pathlib import Path

import mldcn

# From top to bottom; a room may import those before it, and itself.
ROOMS = [
    "errors",
    "layout",
    "schema",
    "config",
    "files",
    "run",
    "report",
    "data",
    "datasets",
    "embedding",
    "interactions",
    "heads",
    "model",
    "metrics",
    "cost",
    "predict",
    "comparison",
    "training",
    "explain",
    "serving",
    "loadtest",
    "study",
    "workflow",
    "repeats",
    "console",
    "study_console",
    "estimator",
    "demo",
    "cli",
]
ROOT = Path(mldcn.__file__).parent


def rooms_imported(file: Path) -> set[str]:
    """The rooms that a file imports anywhere, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module == "mldcn":
            names = [f"mldcn.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        found |= {name.split(".")[1] for name in names if name.startswith("mldcn.")}
    return found - {"__version__"}


def test_rooms_import_only_from_above():
    for file in sorted(ROOT.rglob("*.py")):
        room = file.relative_to(ROOT).parts[0].removesuffix(".py")
        if room == "__init__":
            continue
        assert room in ROOMS, f"{file}: give the room {room!r} its place in ROOMS"
        above = set(ROOMS[: ROOMS.index(room) + 1])
        below = rooms_imported(file) - above
        assert not below, f"{file}: {room} may not import from {', '.join(sorted(below))}"


def test_every_listed_room_exists():
    assert {p.name.removesuffix(".py") for p in ROOT.iterdir() if not p.name.startswith("_")} - {
        "py.typed"
    } == set(ROOMS)
