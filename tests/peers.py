"""Other people's packages that ours is compared with: there in CI, and elsewhere where they could be installed."""

from __future__ import annotations

import importlib
import os
from typing import Any

import pytest


def peer(name: str) -> Any:
    """The module; without it CI fails, and elsewhere what compares with it is skipped."""
    return importlib.import_module(name) if os.environ.get("CI") else pytest.importorskip(name)
