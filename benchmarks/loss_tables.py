"""The tables of the loss on a CPU, for the README and docs/*.md."""

from __future__ import annotations

from pathlib import Path

from benchmarks import tables as t
from benchmarks.tables import LOSS, LOSS_KEYS, Line

# ---- The loss -----------------------------------------------------------------------------------

LOSS_TUNED, LOSS_DEFAULT = (f"ueo_loss_cpu_{name}_allocator.csv" for name in ("tuned", "default"))
LOSS_AVX2 = "ueo_loss_cpu_tuned_allocator_avx2.csv"
LOSS_MEMORY, INSTRUCTIONS = "ueo_loss_cpu_memory.csv", "ueo_loss_cpu_instructions.csv"

Targets = dict[tuple[int, int], tuple[float, float]]
# Design targets: at least this many times faster than (b) eager and (c) torch.compile.
TARGETS: Targets = {
    (64, 345): (6.0, 4.5),
    (256, 1000): (8.0, 5.5),
    (1024, 1000): (12.0, 8.0),
    (4096, 1000): (9.0, 5.0),
    (65536, 345): (6.0, 4.0),
    (4096, 21841): (6.5, 4.0),
}
# Without AVX-512: for the size that CLIP's batches have.
TARGETS_AVX2: Targets = {(1024, 1000): (6.0, 4.0)}


def _loss_times(csv: str, targets: Targets) -> t.Text:
    def target(line: Line, which: int) -> float | None:
        wanted = targets.get((int(line["rows"]), int(line["columns"])))
        return wanted[which] if wanted and line["dtype"] == "float32" else None

    return t.table(
        csv,
        t.by_case(LOSS_KEYS, "median_us"),
        *LOSS,
        *t.times_on_a_cpu(lambda line: target(line, 0), lambda line: target(line, 1)),
        t.ratio("vs (a)", "authors", "ueo_fast"),
        t.OF_THE_FLOOR,
    )


def _sizes_with_targets(csv: str, folder: Path) -> list[Line]:
    return [
        line
        for line in t.by_case(LOSS_KEYS, "median_us")(csv, folder)
        if line["dtype"] == "float32" and (int(line["rows"]), int(line["columns"])) in TARGETS
    ]


def _with_total(csv: str, folder: Path) -> list[Line]:
    lines = t.by_row(csv, folder)
    names = [name for name in lines[0] if name != "loop"]
    totals = {name: f"{sum(float(line[name]) for line in lines):.1f}" for name in names}
    return [*lines, {"loop": "all", **totals}]


def _changes(csv: str, only: str = "") -> t.Text:
    """The table of the changes that begin with ``only``; each is described in its first line."""

    def lines(csv: str, folder: Path) -> list[Line]:
        found = [row for row in t.by_row(csv, folder) if row["change"].startswith(only)]
        last = ""
        for row in found:
            row["size"] = f"{row['rows']} x {row['columns']} {row.get('dtype', '')}".strip()
            if row["change"] == last:
                row |= {"change": "", "prediction": "", "verdict": ""}
            last = row["change"] or last
        return found

    return t.table(
        csv,
        lines,
        *t.words("change", "predicted=prediction", "B x C=size"),
        *t.numbers(lambda us: t.time(float(us)), "before=before_us", "after=after_us"),
        *t.words("=verdict"),
    )


def _gpu_changes_provenance(folder: Path) -> list[str]:
    (line,) = t.provenance("gpu_experiments.csv").draw(folder)
    return [f"Measured with {line.replace('`', '')}"]  # its command is a description


LOSS_TABLES = t.measured_by(
    "`python -m benchmarks loss`",
    {
        "loss in short": t.table(
            LOSS_TUNED,
            _sizes_with_targets,
            t.Column("batch x classes", t.SIZE.cell, words=True),
            *t.numbers(t.time, "ueo_fast", "eager PyTorch=eager", "`torch.compile`=compile"),
            t.ratio("vs eager", "eager", "ueo_fast"),
            t.ratio("vs compile", "compile", "ueo_fast"),
        ),
        "tuned": _loss_times(LOSS_TUNED, TARGETS),
        "tuned provenance": LOSS_TUNED,
        "default": _loss_times(LOSS_DEFAULT, {}),
        "default provenance": LOSS_DEFAULT,
        "memory": t.table(
            LOSS_MEMORY,
            t.by_case(LOSS_KEYS, "peak_over_logits"),
            *LOSS,
            *t.numbers("{:.2f}".format, "ueo_fast", "(b) eager=eager", "(c) compile=compile"),
        ),
        "memory provenance": LOSS_MEMORY,
    },
)
COMMITTED_TABLES = t.measured_by(
    "",  # none of the above: their CSVs are always there
    {
        "avx": _loss_times(LOSS_AVX2, TARGETS_AVX2),
        "avx provenance": LOSS_AVX2,
        "instructions": t.table(
            INSTRUCTIONS,
            _with_total,
            *t.words("loop"),
            more=lambda lines: t.numbers(str, *(name for name in lines[0] if name != "loop")),
        ),
        "instructions provenance": INSTRUCTIONS,
        "experiments": _changes("experiments.csv"),
        "experiments provenance": "experiments.csv",
        "keep": _changes("experiments.csv", "backward reads exp"),
        "avx experiments": _changes("experiments_avx2.csv"),
        "avx experiments provenance": "experiments_avx2.csv",
        "gpu experiments": _changes("gpu_experiments.csv"),
        "gpu experiments provenance": t.Text("gpu_experiments.csv", _gpu_changes_provenance),
    },
)


# ---- What a call of the loss costs besides its arithmetic ---------------------------------------

CALLS = "calls_cpu.csv"
MOST_OURS_US = 35.0
MOST_OF_FUNCTION = 1.25
"""Design targets at 8 x 10: microseconds besides ops and engine, or times a one-op Function."""


def _calls(csv: str, folder: Path) -> list[Line]:
    lines = t.by_case(("rows", "columns", "confidence"), "lowest_us")(csv, folder)
    for line in lines:
        for name, whole in {"its own": "function", "ours": "ueo_fast"}.items():
            line[name] = line[whole] - line["ops"] - line["engine"]
    return lines


def _call_target(line: Line) -> str:
    few = line["ours"] <= MOST_OURS_US or line["ueo_fast"] / line["function"] <= MOST_OF_FUNCTION
    return "met" if few else "missed"


CALLS_TABLES = t.measured_by(
    "`python -m benchmarks calls`",
    {
        "calls": t.table(
            CALLS,
            _calls,
            t.SIZE,
            *t.words("confidence"),
            *t.numbers(t.tenths, "engine", "the ops=ops", "one-op `Function`=function"),
            *t.numbers(t.tenths, "ueo_fast", "its own", "ours"),
            t.ratio("vs one-op `Function`", "ueo_fast", "function", digits=2),
            t.Column("target", _call_target),
        ),
        "calls provenance": CALLS,
    },
)

TABLES = {**LOSS_TABLES, **COMMITTED_TABLES, **CALLS_TABLES}
"""By the marker in the docs."""
