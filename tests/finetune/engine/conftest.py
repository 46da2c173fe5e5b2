"""Images for the engine's tests."""

from __future__ import annotations

import pytest
import torch
from engine_problem import make_images


@pytest.fixture
def images() -> torch.Tensor:
    return make_images()
