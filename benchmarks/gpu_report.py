"""Draw tables of the GPU's CSVs: for docs/performance.md, and short ones for a terminal.

    python -m benchmarks.gpu_report [DIR]

As long as there is no CSV the docs say so, and how to get one.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from benchmarks import markdown, results_file
from benchmarks.affine_cases import AffineCase
from benchmarks.affine_report import layer_cells, tower_cells
from benchmarks.cases import DTYPES, Case
from benchmarks.gpu_cases import CASES, COPY, LABELS

LOSS_CSVS = ("ueo_loss_gpu_time.csv", "ueo_loss_gpu_memory.csv", "ueo_loss_gpu_launches.csv")
AFFINE_CSVS = ("affine_gpu_time.csv", "visual_step_gpu.csv")
TIME, MEMORY, LAUNCHES = LOSS_CSVS
LAYERS, TOWERS = AFFINE_CSVS
KERNELS = "gpu_kernels.csv"
CSVS = (*LOSS_CSVS, *AFFINE_CSVS, KERNELS)
PREDICTIONS = "gpu_predictions.csv"  # next to this file: nobody measured them
BEFORE = "gpu_before"
"""Folder in benchmarks/results: the first run, with the kernels that "before" is about."""

LOSS_KEYS = ("rows", "columns", "dtype")
LAYER_KEYS = ("op", "shape", "layout", "dtype")
TOWER_KEYS = ("model", "batch", "layout", "dtype")
NOT_MEASURED = ["Not measured yet: `bash benchmarks/gpu.sh` on a machine with a GPU does it."]
OURS = ("cuda", "triton", "cpp", "patched")
"""Ratios are of the first of these that a CSV holds; cpp: dry runs."""
AGAIN = "again "
"""Prefix of ours in the second round, where it takes turns with the compiler."""
VS_EAGER, VS_COMPILE, OF_FLOOR = 8.0, 1.5, 0.85
"""Design targets of the loss; the floor's from 16384 x 1000 on."""

Key = tuple[str, ...]
Values = dict[Key, dict[str, str]]
Numbers = dict[Key, dict[str, float]]


# ---- What all tables share ----------------------------------------------------------------------


def _who(row: Mapping[str, str]) -> str:
    """Name a row's contender; in the second round, AGAIN marks all but the compiler."""
    again = row.get("round", "1") != "1" and row["contender"] != "compile"
    return AGAIN * again + row["contender"]


def _values(
    name: str, keys: Sequence[str], column: str, folder: Path | None, mode: str = ""
) -> Values:
    """Read a column by case and contender; the copy is never replayed, so it has one mode."""
    found: Values = {}
    for row in results_file.read(name, folder)[1]:
        of_case = found.setdefault(tuple(row[key] for key in keys), {})
        who = _who(row)
        if row.get("mode", mode) == mode or who == COPY:
            of_case[who] = row[column]
    return found


def _numbers(
    name: str, keys: Sequence[str], column: str, folder: Path | None, mode: str = ""
) -> Numbers:
    values = _values(name, keys, column, folder, mode)
    return {
        key: {who: float(value) for who, value in row.items() if value}
        for key, row in values.items()
    }


def _times(mode: str, folder: Path | None) -> Numbers:
    return _numbers(TIME, LOSS_KEYS, "median_us", folder, mode)


def _with_notes(lines: list[str], name: str, keys: Sequence[str], folder: Path | None) -> list[str]:
    """Append what was left out and why, once per contender and reason."""
    found: dict[str, list[str]] = {}
    cases = set()
    for row in results_file.read(name, folder)[1]:
        case = (
            " ".join([f"{row['rows']} x {row['columns']}", row["dtype"]])
            if keys == LOSS_KEYS
            else " ".join(row[key] for key in keys)
        )
        cases.add(case)
        if row["note"] and _who(row) in LABELS:
            reason = f"{LABELS[_who(row)]}: {row['note']}"
            found.setdefault(reason, []).append(case)
    for reason, where in found.items():
        everywhere = set(where) == cases
        places = "" if everywhere else f" ({', '.join(dict.fromkeys(where))})"
        lines = [*lines, "", f"Left out: {reason}{places}."]
    return lines


def _columns(values: Numbers | Values) -> list[str]:
    """List the contenders with a figure anywhere, in a fixed order."""
    present = {name for row in values.values() for name, value in row.items() if value != ""}
    return [name for name in LABELS if name in present]


def _first_of_ours(names: Sequence[str]) -> str:
    return next((name for name in OURS if name in names), "")


def _ratios(row: dict[str, float], ours: str, targets: Sequence[float | None]) -> list[str]:
    mine = row.get(ours), row.get(AGAIN + ours, row.get(ours))
    return [
        markdown.ratio(row[other] / time, target) if time and other in row else "-"
        for other, target, time in zip(("eager", "compile"), targets, mine, strict=True)
    ]


def _cells(row: dict[str, float], names: Sequence[str], digits: int = 1) -> list[str]:
    return [markdown.time(row[name], digits) if name in row else "-" for name in names]


def _beyond_the_cache(name: str, keys: Sequence[str], folder: Path | None) -> set[Key]:
    """Find the cases whose inputs took turns; other inputs stay in the cache: no floor applies."""
    rows = results_file.read(name, folder)[1]
    return {tuple(row[key] for key in keys) for row in rows if int(row["inputs"]) > 1}


def _copied_bytes(name: str, folder: Path | None) -> int:
    return int(results_file.read(name, folder)[0]["copied bytes"])


# ---- The loss -----------------------------------------------------------------------------------


def _case(key: Key) -> list[str]:
    rows, columns, dtype = key
    return [f"{rows} x {columns}", dtype]


def _bytes(key: Key) -> int:
    rows, columns, dtype = key
    return int(rows) * int(columns) * DTYPES[dtype].itemsize


PASSES = 3
"""Reads and writes of the logits by a pass that keeps nothing on the chip."""


def floor_us(key: Key, copy_us: float, copied_bytes: int) -> float:
    """Compute the time of two reads and one write of the logits at the copy's rate."""
    return PASSES * _bytes(key) / (2 * copied_bytes) * copy_us


def _fraction(value: float | None, floor: float, key: Key) -> str:
    if value is None:
        return "-"
    target = OF_FLOOR if _bytes(key) >= _bytes(("16384", "1000", key[2])) else None
    shown = f"{100 * floor / value:.0f}%"
    if target is None:
        return shown
    wanted = f"target {100 * target:.0f}%"
    return f"**{shown}** ({wanted})" if floor >= target * value else f"{shown} ({wanted}, missed)"


def time_table(mode: str, folder: Path | None = None) -> list[str]:
    """Draw the times ``replayed`` (no gaps, with the floors) or ``launched`` from Python."""
    times = _times(mode, folder)
    names = _columns(times)
    ours = _first_of_ours(names)
    head = ["B x C", "dtype", *(LABELS[name] for name in names), "vs (b)", "vs (c)"]
    if mode == "replayed":
        head += ["the floor", "of it", "`loss_and_grad` of it"]
    cold = _beyond_the_cache(TIME, LOSS_KEYS, folder)
    copied = _copied_bytes(TIME, folder)
    lines = []
    for key, row in times.items():
        cells = _case(key) + _cells(row, names) + _ratios(row, ours, (VS_EAGER, VS_COMPILE))
        if mode == "replayed" and key in cold and COPY in row:
            floor = floor_us(key, row[COPY], copied)
            cells.append(markdown.time(floor, digits=1))
            cells += [_fraction(row.get(name), floor, key) for name in (ours, "loss_and_grad")]
        elif mode == "replayed":
            cells += ["-"] * 3
        lines.append(cells)
    return _with_notes(markdown.table(head, lines, words=2), TIME, LOSS_KEYS, folder)


def _plain_table(name: str, column: str, folder: Path | None = None) -> list[str]:
    values = _values(name, LOSS_KEYS, column, folder)
    names = _columns(values)
    head = ["B x C", "dtype", *(LABELS[name] for name in names)]
    lines = [_case(key) + [row.get(name) or "-" for name in names] for key, row in values.items()]
    return _with_notes(markdown.table(head, lines, words=2), name, LOSS_KEYS, folder)


def bandwidth(folder: Path | None = None) -> float:
    """Return the copy's GB/s, reads and writes together: the median over the shapes."""
    copies = sorted(row[COPY] for row in _times("launched", folder).values() if COPY in row)
    return 2 * _copied_bytes(TIME, folder) / copies[len(copies) // 2] / 1e3


def provenance() -> list[str]:
    (line,) = markdown.provenance(TIME)
    return [f"{line[:-1]}. The copy moved {bandwidth():.0f} GB/s."]


def _megabytes(size: int) -> str:
    value = size / 1e6
    return f"{value:.3g} MB" if value < 1000 else f"{value:.0f} MB"


def floors() -> list[str]:
    """Draw the bytes that a pass must move on any machine."""
    head = ["B x C", "dtype", "logits", "two reads, one write"]
    keys = [(str(case.rows), str(case.columns), case.dtype) for case in CASES]
    lines = [
        _case(key) + [_megabytes(passes * _bytes(key)) for passes in (1, PASSES)] for key in keys
    ]
    return markdown.table(head, lines, words=2)


# ---- What was predicted of the loss's kernels, and what the counters say ------------------------


WHAT = ("statistics", "gradient", "time", "of the floor")
"""Warp instructions per row of forward's kernels and of the gradient's, and the resulting time."""


def _predicted() -> list[tuple[str, Key, list[str]]]:
    """Read which kernels, the case, and a cell for each of WHAT."""
    header, rows = results_file.read(PREDICTIONS, Path(__file__).parent)
    found = []
    for row in rows:
        key = row["rows"], row["columns"], row["dtype"]
        percent = int(row["percent_of_floor"])
        floor = 1e6 * PASSES * _bytes(key) / float(header["bytes per second"])
        cells = [row["statistics"], row["gradient"], markdown.time(100 * floor / percent)]
        found.append((row["kernels"], key, [*cells, f"{percent}%"]))
    return found


def _measured(key: Key, folder: Path | None) -> list[str]:
    """Format what was measured: a cell for each of WHAT."""
    there = {name for name in (TIME, KERNELS) if ((folder or results_file.FOLDER) / name).exists()}
    cells = dict.fromkeys(WHAT, "not yet")
    case = str(Case(int(key[0]), int(key[1]), key[2]))
    counted: dict[str, float] = {}
    for row in results_file.read(KERNELS, folder)[1] if KERNELS in there else ():
        if row["case"] == case and row["instructions_per_row"]:
            what = "gradient" if "gradient" in row["kernel"] else "statistics"
            counted[what] = counted.get(what, 0.0) + float(row["instructions_per_row"])
    cells |= {what: f"{value:.0f}" for what, value in counted.items()}
    row = _times("replayed", folder).get(key, {}) if TIME in there else {}
    if {"cuda", COPY} <= set(row):
        floor = floor_us(key, row[COPY], _copied_bytes(TIME, folder))
        cells["time"] = markdown.time(row["cuda"])
        cells["of the floor"] = f"{100 * floor / row['cuda']:.0f}%"
    return list(cells.values())


def prediction_table() -> list[str]:
    """Show each prediction next to the measurement of the same kernels."""
    before = results_file.FOLDER / BEFORE
    head = ["kernels", "B x C", "dtype"]
    for what in WHAT:
        head += [f"{what}, predicted", "measured"]
    lines = []
    for kernels, key, predicted in _predicted():
        measured = _measured(key, before if kernels == "before" else None)
        pairs = zip(predicted, measured, strict=True)
        lines.append([kernels, *_case(key), *(cell for pair in pairs for cell in pair)])
    return markdown.table(head, lines, words=3)


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


def _counter(name: str, row: dict[str, str]) -> str:
    value = row[name] if name != "instructions_per_row" or "ueo_" in row["kernel"] else ""
    if not value:
        return "-"
    if name.endswith("bytes"):
        return _megabytes(int(float(value)))
    return f"{float(value):.0f}" if float(value) >= 100 else f"{float(value):.3g}"


def counter_table(folder: Path | None = None) -> list[str]:
    lines = [
        [row["case"], row["kernel"], *(_counter(name, row) for name in COUNTERS)]
        for row in results_file.read(KERNELS, folder)[1]
    ]
    return markdown.table(["case", "kernel", *COUNTERS.values()], lines, words=2)


# ---- The affine layers and the patched towers ---------------------------------------------------


def _of_the_floor(key: Key, row: dict[str, float], ours: str, folder: Path | None) -> str:
    """Divide the time of copying as many bytes as must be moved by ours."""
    op, shape, layout, dtype = key
    case = AffineCase(op, tuple(map(int, shape.split("x"))), layout, dtype)
    floor = case.moves * case.bytes / (2 * _copied_bytes(LAYERS, folder)) * row[COPY]
    return f"{100 * floor / row[ours]:.0f}%"


def layer_table(mode: str, folder: Path | None = None) -> list[str]:
    times = _numbers(LAYERS, LAYER_KEYS, "median_us", folder, mode)
    names = _columns(times)
    ours = _first_of_ours(names)
    head = ["layer", "x", "layout", "dtype", *(LABELS[name] for name in names), "vs (b)", "vs (c)"]
    cold = _beyond_the_cache(LAYERS, LAYER_KEYS, folder)
    lines = []
    for key, row in times.items():
        floor = key in cold and {ours, COPY} <= set(row)
        cells = [*layer_cells(key), *_cells(row, names), *_ratios(row, ours, (None, None))]
        lines.append([*cells, _of_the_floor(key, row, ours, folder) if floor else "-"])
    table = markdown.table([*head, "of the floor"], lines, words=4)
    return _with_notes(table, LAYERS, LAYER_KEYS, folder)


def step_table(folder: Path | None = None) -> list[str]:
    times = _numbers(TOWERS, TOWER_KEYS, "median_us", folder)
    peaks = _numbers(TOWERS, TOWER_KEYS, "peak_bytes", folder)
    names = _columns(times)
    head = ["tower", "batch", "layout", "dtype", *(LABELS[name] for name in names)]
    head += ["vs (b)", "vs (c)", *(f"peak, {LABELS[name]}" for name in names)]
    lines = []
    for key, row in times.items():
        cells = [*tower_cells(key), *_cells(row, names, digits=0)]
        cells += _ratios(row, "patched", (None, None))
        cells += [
            f"{peaks[key][name] / 2**20:,.0f} MiB" if name in peaks[key] else "-" for name in names
        ]
        lines.append(cells)
    return _with_notes(markdown.table(head, lines, words=4), TOWERS, TOWER_KEYS, folder)


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


def _short_times(name: str, keys: Sequence[str], folder: Path | None) -> list[str]:
    times = _numbers(name, keys, "median_us", folder, "" if name == TOWERS else "replayed")
    names = _columns(times)
    rows = [
        [" ".join(_case(key) if keys == LOSS_KEYS else key)]
        + [f"{row[who]:.1f}" if who in row else "-" for who in names]
        for key, row in times.items()
    ]
    lines = _aligned([["us", *names], *rows])
    return lines + [line[:200] for line in _with_notes([], name, keys, folder) if line]


def _short_predictions(folder: Path | None) -> list[str]:
    """Show each measurement next to both predictions."""
    lines: dict[Key, list[list[str]]] = {}
    for _, key, predicted in _predicted():
        lines.setdefault(key, [_measured(key, folder)]).append(predicted)
    head = ["measured / predicted before / in registers", *WHAT]
    return _aligned(
        [head]
        + [
            [" ".join(_case(key)), *(" / ".join(cells) for cells in zip(*columns, strict=True))]
            for key, columns in lines.items()
        ]
    )


def short_counters(folder: Path | None) -> list[str]:
    names = ("time_us", "instructions_per_row", "issue_active_percent", "dram_percent", "registers")
    rows = results_file.read(KERNELS, folder)[1]
    return _aligned(
        [["counters", *names]]
        + [[f"{row['case']} {row['kernel']}", *(_counter(name, row) for name in names)]
           for row in rows]
    )  # fmt: skip


def short_report(folder: Path | None = None) -> list[str]:
    """Format what a run prints last: microseconds of graph replays, predictions, counters."""
    there = [name for name in CSVS if ((folder or results_file.FOLDER) / name).exists()]
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


_table = functools.partial(markdown.if_measured, otherwise=NOT_MEASURED)


def _provenance(name: str) -> Callable[[], list[str]]:
    return _table(name, lambda: markdown.provenance(name))


TABLES: dict[str, Callable[[], list[str]]] = {
    "gpu floors": floors,
    "gpu predictions": prediction_table,
    "gpu before provenance": _provenance(f"{BEFORE}/{TIME}"),
    "gpu before counters provenance": _provenance(f"{BEFORE}/{KERNELS}"),
    "gpu replayed": _table(TIME, lambda: time_table("replayed")),
    "gpu launched": _table(TIME, lambda: time_table("launched")),
    "gpu memory": _table(MEMORY, lambda: _plain_table(MEMORY, "peak_over_logits")),
    "gpu launches": _table(LAUNCHES, lambda: _plain_table(LAUNCHES, "launches")),
    "gpu provenance": _table(TIME, provenance),
    "gpu counters": _table(KERNELS, counter_table),
    "gpu counters provenance": _provenance(KERNELS),
    "gpu affine replayed": _table(LAYERS, lambda: layer_table("replayed")),
    "gpu affine launched": _table(LAYERS, lambda: layer_table("launched")),
    "gpu affine provenance": _provenance(LAYERS),
    "gpu patch": _table(TOWERS, step_table),
}
"""By name of the marker in docs/performance.md."""


if __name__ == "__main__":
    print("\n".join(short_report(Path(sys.argv[1]) if len(sys.argv) > 1 else None)))
