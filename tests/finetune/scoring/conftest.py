"""A classifier and a folder of photos, made once per test file."""

from __future__ import annotations

from pathlib import Path

import pytest
from score_photos import make_classifier, make_photos

from ueo_fast.finetune.clip.model import ClipClassifier


@pytest.fixture(scope="module")
def classifier() -> ClipClassifier:
    return make_classifier()


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    return make_photos(tmp_path_factory.mktemp("photos"))
