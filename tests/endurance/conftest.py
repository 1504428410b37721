"""The long checks are scripts: their folder is put on the path, so that the tests can run small versions."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "endurance"))
