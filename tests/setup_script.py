"""setup.py as a module: what it decides is tested, and asked by tests of what it built."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

PATH = Path(__file__).resolve().parent.parent / "setup.py"


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("ueo_fast_setup", PATH)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
