"""Update rules: one file per optimizer. Every module in this folder that defines one is found and imported."""

from __future__ import annotations

import importlib
import pkgutil

from .base import RULES, State, UpdateRule, rule_of_class
from .options import OptimizerOptions

for _module in pkgutil.iter_modules(__path__, f"{__name__}."):
    importlib.import_module(_module.name)

__all__ = ["RULES", "OptimizerOptions", "State", "UpdateRule", "rule_of_class"]
