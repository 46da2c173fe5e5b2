"""What a run of the demonstration leaves behind: a table, a paragraph, plots."""

from __future__ import annotations

import statistics
import textwrap
from collections.abc import Sequence

import torch

from ueo_fast.finetune.data.names import plural
from ueo_fast.finetune.demo.config import DemoConfig
from ueo_fast.finetune.demo.digits import DIGIT_NAMES
from ueo_fast.finetune.demo.plots import (
    plot_mcm_histograms,
    plot_per_class_accuracy,
    plot_samples,
)
from ueo_fast.finetune.demo.problem import Problem
from ueo_fast.finetune.demo.result import MethodResult
from ueo_fast.finetune.demo.verdict import RULE, verdict
from ueo_fast.finetune.evaluation.results_table import ResultsTable
from ueo_fast.finetune.files.run_folder import RunFolder, environment

_CONVENTIONS = (
    "Percent, mean ± sample standard deviation over seeds. AUROC is of the MCM score with known "
    "images as the positive class; HM is the harmonic mean of per-class accuracy and AUROC. Every "
    "method starts from the same pre-trained model. EntMin, InfoMax and UEO take the same gradient "
    "steps; AdaBN, where there is one, takes one pass without gradients. The unlabelled images are "
    "part of the test set (transductive); labels are never "
    f"used in adaptation. {RULE}"
)


def write_report(
    folder: RunFolder,
    config: DemoConfig,
    problems: Sequence[Problem],
    results: Sequence[MethodResult],
    *,
    threads: int,
    seconds: float,
) -> str:
    """Write ``results.md`` and the plots into ``folder``.

    Args:
        folder: of the run.
        config: of the run.
        problems: one per seed.
        results: of every seed and method.
        threads: that the run used.
        seconds: wall time of the run.

    Returns:
        The table and the paragraph under it, for the terminal.
    """
    records = [result.record() for result in results]
    table = ResultsTable.from_records(records)
    paragraph = verdict(records)
    title = (
        f"Tiny CLIP ({config.tower}) on handwritten digits, shift {config.shift} "
        f"({config.effective_severity:g}), scenario {config.scenario}, "
        f"{plural(len(problems), 'seed')}"
    )
    _plot(folder, problems, results)
    folder.write_text(
        "results.md",
        "\n\n".join(
            [
                f"# {title}",
                f"Command: `{config.command()}`",
                table.markdown(),
                _CONVENTIONS,
                paragraph,
                machine_line(threads, seconds),
            ]
        )
        + "\n",
    )
    return "\n\n".join(
        [
            f"\n{title}",
            table.text(),
            _wrap(_CONVENTIONS),
            _wrap(paragraph),
            f"{seconds:.0f} s; table, numbers and plots are in {folder.path}",
        ]
    )


def _plot(folder: RunFolder, problems: Sequence[Problem], results: Sequence[MethodResult]) -> None:
    first = problems[0]
    is_known = first.labels >= 0
    plot_mcm_histograms(
        folder.path / "mcm_histogram.png",
        {
            f"{result.method}, seed {first.seed}": (result.scores, is_known)
            for result in results
            if result.seed == first.seed and result.method in ("zero-shot", "UEO")
        },
    )
    plot_per_class_accuracy(
        folder.path / "per_class_accuracy.png",
        _class_accuracies(results),
        classes=DIGIT_NAMES,
    )
    _plot_domains(folder, first)


def _class_accuracies(results: Sequence[MethodResult]) -> dict[str, dict[str, float]]:
    """Method to digit to mean accuracy over the seeds on which the digit was known."""
    values: dict[str, dict[str, list[float]]] = {}
    for result in results:
        of_method = values.setdefault(result.method, {})
        for name, accuracy in zip(result.known, result.metrics.class_accuracies, strict=True):
            if accuracy is not None:
                of_method.setdefault(name, []).append(accuracy)
    return {
        method: {name: statistics.fmean(seen) for name, seen in of_method.items()}
        for method, of_method in values.items()
    }


def _plot_domains(folder: RunFolder, problem: Problem) -> None:
    def one_per_class(labels: torch.Tensor) -> torch.Tensor:
        return torch.stack([(labels == digit).nonzero()[0, 0] for digit in range(10)])

    source = one_per_class(problem.source.labels)
    target = one_per_class(problem.target.labels)
    status = [name if name in problem.split.known else f"{name}\n(unknown)" for name in DIGIT_NAMES]
    plot_samples(
        folder.path / "samples.png",
        {
            "source": ((problem.source.images[source] + 1) / 2, DIGIT_NAMES),
            "target": (((problem.target.images[target] + 1) / 2).clamp(0, 1), status),
        },
    )


def machine_line(threads: int, seconds: float) -> str:
    """What the numbers and the time of a run depend on, as a sentence.

    Args:
        threads: that the run used.
        seconds: wall time of the run.
    """
    facts = environment(threads)
    versions = facts["versions"]
    return (
        f"{seconds:.0f} s on {plural(threads, 'thread')} of {facts['cpu']} "
        f"({facts['cpu_capability']}); torch {versions['torch']}, "
        f"open_clip {versions['open_clip_torch']}, Python {facts['python']}."
    )


def _wrap(text: str) -> str:
    return textwrap.fill(text, width=96, break_on_hyphens=False)
