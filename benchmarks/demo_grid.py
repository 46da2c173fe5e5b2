"""How the demonstration's learning rates and epochs were chosen: a grid on seeds 100 to 104.

    python benchmarks/demo_grid.py            # writes docs/results/demo_grid.md, some ten minutes

The seeds are not among those that the demonstration reports. Every combination starts from the
same pre-trained model per seed; the other methods use what is chosen here for UEO.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from pathlib import Path

import torch

from ueo_fast.finetune.demo.config import DemoConfig
from ueo_fast.finetune.demo.digits import draw
from ueo_fast.finetune.demo.report import machine_line
from ueo_fast.finetune.demo.run import pretrained, run_method
from ueo_fast.finetune.evaluation.results_table import Spread
from ueo_fast.finetune.methods import UEO, InfoMax, Method, ZeroShot

THREADS = 2
SEEDS = (100, 101, 102, 103, 104)
RECIPES = (("bn", "contrast"), ("vit", "noise"))
AFFINE_LR = (1e-2, 3e-2, 1e-1)
PROMPT_LR = (1e-3, 1e-2, 3e-2)
EPOCHS = (5, 10)
METHODS: tuple[Method, ...] = (InfoMax(), UEO())
OUT = Path(__file__).parents[1] / "docs" / "results" / "demo_grid.md"


def grid(base: DemoConfig) -> list[str]:
    """Markdown rows of one recipe."""
    draws = [draw(base, seed) for seed in base.seeds]
    models = [pretrained(base, drawn) for drawn in draws]

    def hm(config: DemoConfig, method: Method) -> str:
        results = [
            run_method(config, drawn, model, method).record["hm"]
            for drawn, model in zip(draws, models, strict=True)
        ]
        return Spread.of([value for value in results if value is not None]).percent()

    title = f"{base.tower} + {base.shift}"
    rows = [f"| {title} | - | - | - | {hm(base, ZeroShot())} | - | - |"]
    for epochs, affine_lr, prompt_lr in itertools.product(EPOCHS, AFFINE_LR, PROMPT_LR):
        config = dataclasses.replace(base, epochs=epochs, affine_lr=affine_lr, prompt_lr=prompt_lr)
        infomax, ueo = (hm(config, method) for method in METHODS)
        rows.append(
            f"| {title} | {epochs} | {affine_lr:g} | {prompt_lr:g} | - | {infomax} | {ueo} |"
        )
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    torch.set_num_threads(THREADS)
    started = time.perf_counter()
    rows = [
        row
        for tower, shift in RECIPES
        for row in grid(DemoConfig(tower=tower, shift=shift, seeds=SEEDS))
    ]
    seeds = f"{SEEDS[0]} to {SEEDS[-1]}"
    OUT.write_text(
        "\n".join(
            [
                "# The grid behind the demonstration's learning rates",
                "",
                f"HM in percent (known as positive), mean ± standard deviation over seeds {seeds}, "
                "OPDA. Command: `python benchmarks/demo_grid.py`.",
                "",
                "| recipe | epochs | affine lr | prompt lr | zero-shot | InfoMax | UEO |",
                "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
                *rows,
                "",
                machine_line(THREADS, time.perf_counter() - started),
                "",
            ]
        ),
        encoding="utf-8",
    )


if __name__ == "__main__":
    main()
