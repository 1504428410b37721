"""All cases and references: one file of ``families/`` for each family of architectures, found by themselves."""

import importlib
import pkgutil

import families
from families.case import LAYOUT, D, perturb_

_NAMES = [found.name for found in pkgutil.iter_modules(families.__path__)]
_FAMILIES = [importlib.import_module(f"families.{name}") for name in _NAMES]
CASES = [case for family in _FAMILIES for case in getattr(family, "CASES", ())]
REFERENCES = {}
for _family in _FAMILIES:
    REFERENCES |= getattr(_family, "REFERENCES", {})

__all__ = ["CASES", "LAYOUT", "REFERENCES", "D", "perturb_"]
