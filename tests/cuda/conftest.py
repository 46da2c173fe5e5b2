"""What the tests on a GPU share."""

from __future__ import annotations

import os

import pytest

from ueo_fast import backends


@pytest.fixture(params=["cuda", "triton"])
def gpu_backend(request):
    """Skips where a backend cannot run; benchmarks/gpu.sh makes that a failure."""
    reason = backends.unavailable_reason(request.param)
    if reason is not None and os.environ.get("UEO_FAST_REQUIRE_GPU") == "1":
        pytest.fail(f"backend {request.param}: {reason}")
    if reason is not None:
        pytest.skip(f"backend {request.param}: {reason}")
    return request.param
