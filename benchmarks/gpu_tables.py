"""The tables of what is measured on a GPU: for docs/performance.md, and short ones for a terminal.

    python -m benchmarks.gpu_tables [DIR]

prints the short ones of the CSVs in a folder.
"""

from __future__ import annotations

import functools
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from benchmarks import results_file
from benchmarks import tables as t
from benchmarks.affine_cases import AffineCase
from benchmarks.cases import DTYPES, Case
from benchmarks.gpu_cases import CASES, COPY, LABELS
from benchmarks.tables import LAYER, LAYER_KEYS, LOSS, LOSS_KEYS, TOWER, TOWER_KEYS, Column, Line

LOSS_CSVS = ("ueo_loss_gpu_time.csv", "ueo_loss_gpu_memory.csv", "ueo_loss_gpu_launches.csv")
AFFINE_CSVS = ("affine_gpu_time.csv", "visual_step_gpu.csv")
TIME, MEMORY, LAUNCHES = LOSS_CSVS
LAYERS, TOWERS = AFFINE_CSVS
KERNELS = "gpu_kernels.csv"
CSVS = (*LOSS_CSVS, *AFFINE_CSVS, KERNELS)
PREDICTIONS = "gpu_predictions.csv"  # next to this file, as it was not measured
BEFORE = "gpu_before"
"""Folder in benchmarks/results: the first run, with the kernels that "before" is about."""

OURS = ("cuda", "triton", "cpp", "patched")
"""Ratios are of the first of these that a CSV has; cpp: dry runs."""
AGAIN = "again "
"""Prefix of ours in the second round, where it takes turns with the compiler."""
VS_EAGER, VS_COMPILE, OF_FLOOR = 8.0, 1.5, 0.85
"""Design targets of the loss; the floor's from 16384 x 1000 on."""
PASSES = 3
"""Reads and writes of the logits by a pass that keeps nothing on the chip."""


# ---- What all tables share ----------------------------------------------------------------------


def _who(row: Mapping[str, str]) -> str:
    """Name a row's contender; in the second round, AGAIN marks all but the compiler."""
    again = row.get("round", "1") != "1" and row["contender"] != "compile"
    return AGAIN * again + row["contender"]


def _by_case(keys: Sequence[str], *values: str, mode: str = "") -> t.Lines:
    """Lines by case and contender in a mode; the copy is never replayed, so it has one mode."""

    def who(row: Mapping[str, str]) -> str | None:
        name = _who(row)
        return name if row.get("mode", mode) == mode or name == COPY else None

    return t.by_case(keys, *values, who=who)


def _present(lines: Sequence[Line]) -> list[str]:
    """The contenders with a value in any line, in a fixed order."""
    return [name for name in LABELS if any(name in line for line in lines)]


def _timed(
    keys: Sequence[str], *values: str, mode: str = "", moved: Callable[[Line], int] | None = None
) -> t.Lines:
    """Add "ours" to the lines, "beside compile", and "floor": the bytes moved at the copy's rate.

    Inputs that did not take turns stay in the cache: no floor applies to them.
    """

    def lines(csv: str, folder: Path) -> list[Line]:
        found = _by_case(keys, *values, mode=mode)(csv, folder)
        present = _present(found)
        ours = next((name for name in OURS if name in present), "")
        header, rows = results_file.read(csv, folder)
        cold = [[row[key] for key in keys] for row in rows if moved and int(row["inputs"]) > 1]
        for line in found:
            if ours in line:
                line["ours"] = line["beside compile"] = line[ours]
            if AGAIN + ours in line:
                line["beside compile"] = line[AGAIN + ours]
            if moved and COPY in line and [line[key] for key in keys] in cold:
                line["floor"] = moved(line) / (2 * int(header["copied bytes"])) * line[COPY]
        return found

    return lines


def _times_and_ratios(
    lines: Sequence[Line],
    text: Callable[[float], str] = t.tenths,
    vs_eager: float | None = None,
    vs_compile: float | None = None,
) -> list[Column]:
    return [
        *t.numbers(text, *_labelled(lines)),
        t.ratio("vs (b)", "eager", "ours", vs_eager),
        t.ratio("vs (c)", "compile", "beside compile", vs_compile),
    ]


def _labelled(lines: Sequence[Line]) -> list[str]:
    return [f"{LABELS[name]}={name}" for name in _present(lines)]


def _case(keys: Sequence[str], row: Mapping[str, str]) -> str:
    if keys == LOSS_KEYS:
        return " ".join(column.cell(dict(row)) for column in LOSS)
    return " ".join(row[key] for key in keys)


def _notes(csv: str, keys: Sequence[str]) -> Callable[[Path], list[str]]:
    """Say what was left out and why, once per contender and reason."""

    def notes(folder: Path) -> list[str]:
        found: dict[str, list[str]] = {}
        rows = results_file.read(csv, folder)[1]
        for row in rows:
            if row["note"] and _who(row) in LABELS:
                reason = f"{LABELS[_who(row)]}: {row['note']}"
                found.setdefault(reason, []).append(_case(keys, row))
        lines = []
        for reason, where in found.items():
            everywhere = set(where) == {_case(keys, row) for row in rows}
            places = "" if everywhere else f" ({', '.join(dict.fromkeys(where))})"
            lines += ["", f"Left out: {reason}{places}."]
        return lines

    return notes


# ---- The loss -----------------------------------------------------------------------------------


def _bytes(line: Mapping[str, str]) -> int:
    return int(line["rows"]) * int(line["columns"]) * DTYPES[line["dtype"]].itemsize


def _moved(line: Line) -> int:
    return PASSES * _bytes(line)


def _times(mode: str) -> t.Lines:
    return _timed(LOSS_KEYS, "median_us", mode=mode, moved=_moved)


def _floor_target(line: Line) -> float | None:
    large = _bytes(line) >= _bytes({**line, "rows": "16384", "columns": "1000"})
    return OF_FLOOR if large else None


def _time_table(mode: str) -> t.Text:
    """The times ``replayed`` (no gaps, with the floors) or ``launched`` from Python."""

    def more(lines: list[Line]) -> list[Column]:
        columns = _times_and_ratios(lines, t.tenths, VS_EAGER, VS_COMPILE)
        if mode == "replayed":
            columns += t.numbers(t.tenths, "the floor=floor")
            columns += [
                t.ratio(label, "floor", name, _floor_target, percent=True)
                for label, name in (("of it", "ours"), ("`loss_and_grad` of it", "loss_and_grad"))
            ]
        return columns

    return t.table(TIME, _times(mode), *LOSS, more=more, notes=_notes(TIME, LOSS_KEYS))


def _plain_table(csv: str, value: str, text: Callable[[float], str]) -> t.Text:
    return t.table(
        csv,
        _by_case(LOSS_KEYS, value),
        *LOSS,
        more=lambda lines: t.numbers(text, *_labelled(lines)),
        notes=_notes(csv, LOSS_KEYS),
    )


def bandwidth(folder: Path) -> float:
    """The copy's GB/s, reads and writes together: the median over the shapes."""
    lines = _times("launched")(TIME, folder)
    copies = sorted(line[COPY] for line in lines if COPY in line)
    copied = int(results_file.read(TIME, folder)[0]["copied bytes"])
    return 2 * copied / copies[len(copies) // 2] / 1e3


def _provenance(folder: Path) -> list[str]:
    (line,) = t.provenance(TIME).draw(folder)
    return [f"{line[:-1]}. The copy moved {bandwidth(folder):.0f} GB/s."]


def _megabytes(size: float) -> str:
    value = size / 1e6
    return f"{value:.3g} MB" if value < 1000 else f"{value:.0f} MB"


def _sizes(csv: str, folder: Path) -> list[Line]:
    cases = [{"rows": str(c.rows), "columns": str(c.columns), "dtype": c.dtype} for c in CASES]
    return [{**case, "logits": _bytes(case), "moved": _moved(case)} for case in cases]


# ---- What was predicted of the loss's kernels, and what the counters say ------------------------


WHAT = ("statistics", "gradient", "time", "of the floor")
"""Warp instructions per row of forward's kernels and of the gradient's, and the resulting time."""


def _predicted() -> list[Line]:
    """Which kernels, the case, and a text for each of WHAT."""
    header, rows = results_file.read(PREDICTIONS, Path(__file__).parent)
    lines: list[Line] = []
    for row in rows:
        percent = int(row["percent_of_floor"])
        floor = 1e6 * _moved(row) / float(header["bytes per second"])
        lines.append({**row, "time": t.time(100 * floor / percent), "of the floor": f"{percent}%"})
    return lines


def _measured(case: Line, folder: Path) -> Line:
    """A text for each of WHAT."""
    shown = dict.fromkeys(WHAT, "not yet")
    if (folder / KERNELS).exists():
        name = str(Case(int(case["rows"]), int(case["columns"]), case["dtype"]))
        counted: Counter[str] = Counter()
        for row in results_file.read(KERNELS, folder)[1]:
            if row["case"] == name and row["instructions_per_row"]:
                what = "gradient" if "gradient" in row["kernel"] else "statistics"
                counted[what] += float(row["instructions_per_row"])
        shown |= {what: f"{value:.0f}" for what, value in counted.items()}
    if (folder / TIME).exists():
        for line in _times("replayed")(TIME, folder):
            same = all(line[key] == case[key] for key in LOSS_KEYS)
            if same and {"cuda", "floor"} <= line.keys():
                shown["time"] = t.time(line["cuda"])
                shown["of the floor"] = f"{100 * line['floor'] / line['cuda']:.0f}%"
    return shown


def _predictions(csv: str, folder: Path) -> list[Line]:
    """Each prediction and the measurement of the same kernels."""
    lines = _predicted()
    for line in lines:
        measured = _measured(line, folder / BEFORE if line["kernels"] == "before" else folder)
        line |= {f"{what} measured": measured[what] for what in WHAT}
    return lines


def _pair(what: str) -> tuple[str, str]:
    return f"{what}, predicted={what}", f"measured={what} measured"


COUNTERS = {
    "time_us": "time, µs",
    "instructions_per_row": "instructions per row",
    "issue_active_percent": "issue slots used, %",
    "dram_percent": "memory's rate, %",
    "dram_read_bytes": "read",
    "dram_write_bytes": "written",
    "warps_active_percent": "occupancy, %",
    "registers": "registers",
}


def _counter(name: str, label: str = "") -> Column:
    def cell(row: Line) -> str:
        value = row[name] if name != "instructions_per_row" or "ueo_" in row["kernel"] else ""
        if not value:
            return "-"
        if name.endswith("bytes"):
            return _megabytes(int(float(value)))
        return f"{float(value):.0f}" if float(value) >= 100 else f"{float(value):.3g}"

    return Column(label or name, cell)


# ---- The affine layers and the patched towers ---------------------------------------------------


def _moved_by_layer(line: Line) -> int:
    shape = tuple(map(int, line["shape"].split("x")))
    case = AffineCase(line["op"], shape, line["layout"], line["dtype"])
    return case.moves * case.bytes


def _layer_table(mode: str) -> t.Text:
    return t.table(
        LAYERS,
        _timed(LAYER_KEYS, "median_us", mode=mode, moved=_moved_by_layer),
        *LAYER,
        more=lambda lines: [
            *_times_and_ratios(lines),
            t.ratio("of the floor", "floor", "ours", percent=True),
        ],
        notes=_notes(LAYERS, LAYER_KEYS),
    )


def _step_columns(lines: list[Line]) -> list[Column]:
    peaks = [f"peak, {label} peak_bytes" for label in _labelled(lines)]
    return [
        *_times_and_ratios(lines, t.time),
        *t.numbers(lambda size: f"{size / 2**20:,.0f} MiB", *peaks),
    ]


# ---- For a terminal -----------------------------------------------------------------------------


def _aligned(table: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in table
    ]


def _short_times(csv: str, keys: Sequence[str], folder: Path) -> list[str]:
    mode = "" if csv == TOWERS else "replayed"
    lines = _by_case(keys, "median_us", mode=mode)(csv, folder)
    case = Column("us", functools.partial(_case, keys))
    columns = [case, *t.numbers("{:.1f}".format, *_present(lines))]
    notes = [line[:200] for line in _notes(csv, keys)(folder) if line]
    return _aligned(t.cells(columns, lines)) + notes


def _short_predictions(folder: Path) -> list[str]:
    """Show each measurement next to both predictions."""
    found: dict[str, list[Line]] = {}
    for line in _predicted():
        measured_first = found.setdefault(_case(LOSS_KEYS, line), [_measured(line, folder)])
        measured_first.append(line)
    return _aligned(
        [["measured / predicted before / in registers", *WHAT]]
        + [
            [case, *(" / ".join(line[what] for line in lines) for what in WHAT)]
            for case, lines in found.items()
        ]
    )


def short_counters(folder: Path) -> list[str]:
    names = ("time_us", "instructions_per_row", "issue_active_percent", "dram_percent", "registers")
    case = Column("counters", lambda row: f"{row['case']} {row['kernel']}")
    return _aligned(t.cells([case, *map(_counter, names)], t.by_row(KERNELS, folder)))


def short_report(folder: Path) -> list[str]:
    """Format what a run prints last: microseconds of graph replays, predictions, counters."""
    there = [name for name in CSVS if (folder / name).exists()]
    lines: list[str] = []
    if TIME in there:
        lines += _short_times(TIME, LOSS_KEYS, folder)
        lines += [f"copy: {bandwidth(folder):.0f} GB/s", *_short_predictions(folder)]
    if KERNELS in there:
        lines += short_counters(folder)
    if LAYERS in there:
        lines += _short_times(LAYERS, LAYER_KEYS, folder)
    if TOWERS in there:
        lines += _short_times(TOWERS, TOWER_KEYS, folder)
    return lines


TABLES = t.measured_by(
    "`bash benchmarks/gpu.sh` on a machine with a GPU",
    {
        "gpu floors": t.table(
            "", _sizes, *LOSS, *t.numbers(_megabytes, "logits", "two reads, one write=moved")
        ),
        "gpu predictions": t.table(
            "",
            _predictions,
            *t.words("kernels"),
            *LOSS,
            *t.numbers(str, *(one for what in WHAT for one in _pair(what))),
        ),
        "gpu before provenance": f"{BEFORE}/{TIME}",
        "gpu before counters provenance": f"{BEFORE}/{KERNELS}",
        "gpu replayed": _time_table("replayed"),
        "gpu launched": _time_table("launched"),
        "gpu memory": _plain_table(MEMORY, "peak_over_logits", "{:.3f}".format),
        "gpu launches": _plain_table(LAUNCHES, "launches", "{:.0f}".format),
        "gpu provenance": t.Text(TIME, _provenance),
        "gpu counters": t.table(
            KERNELS,
            t.by_row,
            *t.words("case", "kernel"),
            *(_counter(name, label) for name, label in COUNTERS.items()),
        ),
        "gpu counters provenance": KERNELS,
        "gpu affine replayed": _layer_table("replayed"),
        "gpu affine launched": _layer_table("launched"),
        "gpu affine provenance": LAYERS,
        "gpu patch": t.table(
            TOWERS,
            _timed(TOWER_KEYS, "median_us", "peak_bytes"),
            *TOWER,
            more=_step_columns,
            notes=_notes(TOWERS, TOWER_KEYS),
        ),
    },
)
"""By the marker in docs/performance.md."""


if __name__ == "__main__":
    print("\n".join(short_report(Path(sys.argv[1]) if len(sys.argv) > 1 else results_file.FOLDER)))
