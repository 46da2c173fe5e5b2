"""How the Triton backend cuts a problem, and the search for a better cut."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from ueo_fast.triton import autotune, tuning


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("tile_scale", autotune.TILE_SCALES)
def test_every_plan_covers_the_batch(tile_scale, double):
    for rows in (1, 63, 64, 65, 4096, 10**7):
        for columns in (1, 7, 345, 2048, 8192, 8193, 10**6):
            plan = tuning.make_plan(rows, columns, double, 132, tile_scale)
            assert plan.chunk_rows % plan.block_rows == 0
            assert (plan.chunks - 1) * plan.chunk_rows < rows <= plan.chunks * plan.chunk_rows
            assert plan.tiled == (plan.block_columns < columns)
            assert plan.block_rows * plan.block_columns <= 32 * 32 * plan.warps * 32
            assert plan.warps in (1, 2, 4, 8, 16, 32)


def test_the_search_takes_the_fastest_plan_once(monkeypatch):
    monkeypatch.setenv("UEO_FAST_TRITON_AUTOTUNE", "1")
    times = iter([3.0, 1.0, 2.0])
    monkeypatch.setattr(autotune.triton.testing, "do_bench", lambda run: (run(), next(times))[1])
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(autotune, "_found", {})
    seen = []
    place = "forward", torch.device("cuda", 0), (64, 345), torch.float32, 132
    assert autotune.with_best_plan(*place, seen.append) is None
    assert len(seen) == len(autotune.TILE_SCALES) + 1
    autotune.with_best_plan(*place, seen.append)
    assert seen[-1] == seen[-2] == seen[1]
    cpu = "forward", torch.device("cpu"), (64, 345), torch.float32, 132
    assert autotune.with_best_plan(*cpu, lambda plan: plan) == seen[0]
