"""Tables of the GPU's CSVs of the affine layers and of a patched tower's step."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from benchmarks import markdown, results_file
from benchmarks.affine_cases import AffineCase
from benchmarks.affine_report import Key, if_measured, layer_cells, tower_cells
from benchmarks.gpu_cases import COPY
from benchmarks.gpu_report import NOT_MEASURED

CSVS = ("affine_gpu_time.csv", "visual_step_gpu.csv")
TIME, STEP = CSVS
LAYER_KEYS, TOWER_KEYS = ("op", "shape", "layout", "dtype"), ("model", "batch", "layout", "dtype")
LABELS = {"cuda": "cuda", "triton": "triton", "cpp": "cpp", "patched": "patched",
          "eager": "(b) eager", "compile": "(c) compile"}  # fmt: skip
OURS = ("cuda", "triton", "cpp", "patched")
"""The first that a CSV holds is what ratios are of; cpp: dry runs."""


def _values(
    name: str, keys: tuple[str, ...], column: str, folder: Path | None, mode: str = ""
) -> dict[Key, dict[str, float]]:
    """By case and contender; times not replayed as graphs are taken as launched."""
    found: dict[Key, dict[str, float]] = {}
    for row in results_file.read(name, folder)[1]:
        case = found.setdefault(tuple(row[key] for key in keys), {})
        if row[column] == "":
            continue
        if row.get("mode", mode) == mode:
            case[row["contender"]] = float(row[column])
        else:
            case.setdefault(row["contender"], float(row[column]))
    return found


def _notes(name: str, keys: tuple[str, ...], folder: Path | None) -> list[str]:
    """What was left out and why, once per contender and reason."""
    found: dict[str, list[str]] = {}
    for row in results_file.read(name, folder)[1]:
        if row["note"] and row["contender"] != COPY:
            reason = f"{LABELS[row['contender']]}: {row['note']}"
            found.setdefault(reason, []).append(" ".join(row[key] for key in keys))
    lines = []
    for reason, where in found.items():
        lines += ["", f"Note on {reason} ({', '.join(dict.fromkeys(where))})."]
    return lines


def _columns(values: dict[Key, dict[str, float]]) -> list[str]:
    present = {name for row in values.values() for name in row}
    return [name for name in LABELS if name in present]


def _ratios(row: dict[str, float], ours: str) -> list[str]:
    return [
        f"{row[other] / row[ours]:.1f}" if ours in row and other in row else "-"
        for other in ("eager", "compile")
    ]


def _of_the_floor(key: Key, row: dict[str, float], ours: str, folder: Path | None) -> str:
    """The time of copying as many bytes as must be moved, over ours; beyond the cache only."""
    if ours not in row or COPY not in row or key not in _beyond_the_cache(folder):
        return "-"
    op, shape, layout, dtype = key
    case = AffineCase(op, tuple(map(int, shape.split("x"))), layout, dtype)
    copied = int(results_file.read(TIME, folder)[0]["copied bytes"])
    floor = case.moves * case.bytes / (2 * copied) * row[COPY]
    return f"{100 * floor / row[ours]:.0f}%"


def _beyond_the_cache(folder: Path | None) -> set[Key]:
    """Cases whose inputs took turns."""
    rows = results_file.read(TIME, folder)[1]
    return {
        tuple(row[key] for key in LAYER_KEYS)
        for row in rows
        if row["inputs"] and int(row["inputs"]) > 1
    }


def layer_table(mode: str, folder: Path | None = None) -> list[str]:
    values = _values(TIME, LAYER_KEYS, "median_us", folder, mode)
    names = _columns(values)
    ours = next((name for name in OURS if name in names), "")
    head = ["layer", "x", "layout", "dtype", *(LABELS[name] for name in names), "vs (b)", "vs (c)"]
    head.append("of the floor")
    lines = [
        layer_cells(key)
        + [markdown.time(row[name], digits=1) if name in row else "-" for name in names]
        + [*_ratios(row, ours), _of_the_floor(key, row, ours, folder)]
        for key, row in values.items()
    ]
    return [*markdown.table(head, lines, words=4), *_notes(TIME, LAYER_KEYS, folder)]


def step_table(folder: Path | None = None) -> list[str]:
    times = _values(STEP, TOWER_KEYS, "median_us", folder)
    peaks = _values(STEP, TOWER_KEYS, "peak_bytes", folder)
    names = _columns(times)
    head = ["tower", "batch", "layout", "dtype", *(LABELS[name] for name in names)]
    head += ["vs (b)", "vs (c)", *(f"peak, {LABELS[name]}" for name in names)]
    lines = []
    for key, row in times.items():
        cells = tower_cells(key)
        cells += [markdown.time(row[name]) if name in row else "-" for name in names]
        cells += _ratios(row, "patched")
        cells += [
            f"{peaks[key][name] / 2**20:,.0f} MiB" if name in peaks[key] else "-" for name in names
        ]
        lines.append(cells)
    return [*markdown.table(head, lines, words=4), *_notes(STEP, TOWER_KEYS, folder)]


def short_table(folder: Path | None = None) -> list[str]:
    """What a run prints last: microseconds of every contender."""
    lines = []
    for name, keys, mode in ((TIME, LAYER_KEYS, "replayed"), (STEP, TOWER_KEYS, "")):
        if not ((folder or results_file.FOLDER) / name).exists():
            continue
        for key, row in _values(name, keys, "median_us", folder, mode).items():
            shown = [f"{one} {us:.1f} us" for one, us in row.items() if one != COPY]
            lines.append(f"{' '.join(key)}: {', '.join(shown) or 'not measured'}")
        lines += [line for line in _notes(name, keys, folder) if line]
    return lines


def _provenance() -> list[str]:
    return markdown.provenance(results_file.read(TIME)[0])


TABLES: dict[str, Callable[[], list[str]]] = {
    "gpu affine replayed": if_measured(TIME, lambda: layer_table("replayed"), NOT_MEASURED),
    "gpu affine launched": if_measured(TIME, lambda: layer_table("launched"), NOT_MEASURED),
    "gpu affine provenance": if_measured(TIME, _provenance, NOT_MEASURED),
    "gpu patch": if_measured(STEP, step_table, NOT_MEASURED),
}
"""By name of the marker in docs/performance.md."""
