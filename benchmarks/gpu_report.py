"""Tables of the GPU's CSVs: for docs/performance.md, and a short one for a terminal.

    python -m benchmarks.gpu_report [DIR]

As long as there is no CSV the docs say so, and how to get one.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from benchmarks import markdown, results_file
from benchmarks.gpu_cases import CASES, COPY, LABELS

CSVS = ("ueo_loss_gpu_time.csv", "ueo_loss_gpu_memory.csv", "ueo_loss_gpu_launches.csv")
TIME, MEMORY, LAUNCHES = CSVS
NOT_MEASURED = ["Not measured yet: `bash benchmarks/gpu.sh` on a machine with a GPU does it."]
OURS = ("cuda", "triton", "cpp")  # the first that a CSV holds is what ratios are of; cpp: dry runs
VS_EAGER, VS_COMPILE, OF_FLOOR = 8.0, 1.5, 0.85
"""Design targets; the floor's from 16384 x 1000 on."""

Key = tuple[int, int, str]
Values = dict[Key, dict[str, str]]


def _values(name: str, column: str, folder: Path | None, mode: str = "") -> Values:
    """One column by case and contender; times not replayed as graphs are taken as launched."""
    found: Values = {}
    for row in results_file.read(name, folder)[1]:
        key = int(row["rows"]), int(row["columns"]), row["dtype"]
        of_case = found.setdefault(key, {})
        if row.get("mode", mode) == mode:
            of_case[row["contender"]] = row[column]
        elif row.get("mode") == "launched":
            of_case.setdefault(row["contender"], row[column])
    return found


def _times(mode: str, folder: Path | None) -> dict[Key, dict[str, float]]:
    values = _values(TIME, "median_us", folder, mode)
    return {key: {name: float(us) for name, us in row.items() if us} for key, row in values.items()}


def _notes(name: str, folder: Path | None) -> list[str]:
    """What was left out and why, once per contender and reason."""
    found: dict[str, list[str]] = {}
    for row in results_file.read(name, folder)[1]:
        if row["note"] and row["contender"] != COPY:
            reason = f"{LABELS[row['contender']]}: {row['note']}"
            found.setdefault(reason, []).append(f"{row['rows']} x {row['columns']} {row['dtype']}")
    cases = len(_values(name, "contender", folder))
    return [
        f"Left out: {reason}" + ("" if len(where) >= cases else f" ({', '.join(where)})") + "."
        for reason, where in found.items()
    ]


def _with_notes(lines: list[str], name: str, folder: Path | None) -> list[str]:
    notes = _notes(name, folder)
    return [*lines, "", *"\n\n".join(notes).split("\n")] if notes else lines


def _columns(values: dict[Key, dict[str, float]] | Values) -> list[str]:
    """The contenders with a figure anywhere, in a fixed order."""
    present = {name for row in values.values() for name, value in row.items() if value != ""}
    return [name for name in LABELS if name in present]


def _case(key: Key) -> list[str]:
    rows, columns, dtype = key
    return [f"{rows} x {columns}", dtype]


def _bytes(key: Key) -> int:
    rows, columns, dtype = key
    return rows * columns * (4 if dtype == "float32" else 2)


def floor_us(passes: int, key: Key, copy_us: float, copied_bytes: int) -> float:
    """Time of reading and writing the logits ``passes`` times in all, at the copy's rate."""
    return passes * _bytes(key) / (2 * copied_bytes) * copy_us


def _beyond_the_cache(folder: Path | None) -> set[Key]:
    """Cases whose inputs took turns: the others' logits stay in the cache, no floor applies."""
    inputs = _values(TIME, "inputs", folder, "launched")
    return {key for key, row in inputs.items() if any(int(count) > 1 for count in row.values())}


def _fraction(value: float | None, floor: float, key: Key) -> str:
    if value is None:
        return "-"
    target = OF_FLOOR if _bytes(key) >= _bytes((16384, 1000, key[2])) else None
    shown = f"{100 * floor / value:.0f}%"
    if target is None:
        return shown
    wanted = f"target {100 * target:.0f}%"
    return f"**{shown}** ({wanted})" if floor >= target * value else f"{shown} ({wanted}, missed)"


def time_table(mode: str, folder: Path | None = None) -> list[str]:
    """``replayed``: no gaps between launches, and the floors; ``launched``: from Python."""
    header = results_file.read(TIME, folder)[0]
    times = _times(mode, folder)
    names = _columns(times)
    ours = next((name for name in OURS if name in names), "")
    head = ["B x C", "dtype", *(LABELS[name] for name in names), "vs (b)", "vs (c)"]
    if mode == "replayed":
        head += ["two reads, one write", "of it", "one read, one write", "`loss_and_grad` of it"]
    cold = _beyond_the_cache(folder)
    lines = []
    for key, row in times.items():
        cells = _case(key) + [
            markdown.time(row[name], digits=1) if name in row else "-" for name in names
        ]
        for other, target in (("eager", VS_EAGER), ("compile", VS_COMPILE)):
            both = ours in row and other in row
            cells.append(markdown.ratio(row[other] / row[ours], target) if both else "-")
        if mode == "replayed" and key in cold and COPY in row:
            for passes, name in ((3, ours), (2, "loss_and_grad")):
                floor = floor_us(passes, key, row[COPY], int(header["copied bytes"]))
                cells.append(markdown.time(floor, digits=1))
                cells.append(_fraction(row.get(name), floor, key))
        elif mode == "replayed":
            cells += ["-"] * 4
        lines.append(cells)
    return _with_notes(markdown.table(head, lines, words=2), TIME, folder)


def _plain_table(name: str, column: str, folder: Path | None = None) -> list[str]:
    values = _values(name, column, folder)
    names = _columns(values)
    head = ["B x C", "dtype", *(LABELS[name] for name in names)]
    lines = [_case(key) + [row.get(name) or "-" for name in names] for key, row in values.items()]
    return _with_notes(markdown.table(head, lines, words=2), name, folder)


def memory_table(folder: Path | None = None) -> list[str]:
    return _plain_table(MEMORY, "peak_over_logits", folder)


def launch_table(folder: Path | None = None) -> list[str]:
    return _plain_table(LAUNCHES, "launches", folder)


def bandwidth(folder: Path | None = None) -> float:
    """GB/s of the copy, read and written bytes together: the median over the shapes."""
    header = results_file.read(TIME, folder)[0]
    copies = sorted(row[COPY] for row in _times("launched", folder).values() if COPY in row)
    return 2 * int(header["copied bytes"]) / copies[len(copies) // 2] / 1e3


def provenance(folder: Path | None = None) -> list[str]:
    (line,) = markdown.provenance(results_file.read(TIME, folder)[0])
    return [f"{line[:-1]}. The copy moved {bandwidth(folder):.0f} GB/s."]


def _megabytes(size: int) -> str:
    value = size / 1e6
    return f"{value:.3g} MB" if value < 1000 else f"{value:.0f} MB"


def floors() -> list[str]:
    """Bytes only: what a pass must move, whatever the machine."""
    head = ["B x C", "dtype", "logits", "two reads, one write", "one read, one write"]
    lines = [
        _case(key) + [_megabytes(passes * _bytes(key)) for passes in (1, 3, 2)]
        for key in ((case.rows, case.columns, case.dtype) for case in CASES)
    ]
    return markdown.table(head, lines, words=2)


def short_table(folder: Path | None = None) -> list[str]:
    """Replayed microseconds of every contender: what a run prints last."""
    times = _times("replayed", folder)
    names = _columns(times)
    lines = [[" ".join(_case(key))] + [f"{row[name]:.1f}" if name in row else "-" for name in names]
             for key, row in times.items()]  # fmt: skip
    table = [["us, graph replays", *names], *lines]
    widths = [max(len(row[column]) for row in table) for column in range(len(names) + 1)]
    shown = [
        "  ".join(cell.ljust(width) if column == 0 else cell.rjust(width)
                  for column, (cell, width) in enumerate(zip(row, widths, strict=True)))
        for row in table
    ]  # fmt: skip
    copied = any(COPY in row for row in times.values())
    return [*shown, f"copy: {bandwidth(folder):.0f} GB/s"] if copied else shown


def _if_measured(make: Callable[[], list[str]]) -> Callable[[], list[str]]:
    def table() -> list[str]:
        return make() if (results_file.FOLDER / TIME).exists() else NOT_MEASURED

    return table


TABLES: dict[str, Callable[[], list[str]]] = {
    "gpu floors": floors,
    "gpu replayed": _if_measured(lambda: time_table("replayed")),
    "gpu launched": _if_measured(lambda: time_table("launched")),
    "gpu memory": _if_measured(memory_table),
    "gpu launches": _if_measured(launch_table),
    "gpu provenance": _if_measured(provenance),
}
"""By name of the marker in docs/performance.md."""


if __name__ == "__main__":
    print("\n".join(short_table(Path(sys.argv[1]) if len(sys.argv) > 1 else None)))
