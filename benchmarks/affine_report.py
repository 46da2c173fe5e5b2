"""Tables of the affine layers' and the patched towers' CSVs, for docs/performance.md and patch.md.

As long as there is no CSV the docs say so, and how to get one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks import markdown, results_file

TUNED, DEFAULT = (f"affine_cpu_{name}_allocator.csv" for name in ("tuned", "default"))
STEP, MEMORY = "visual_step_cpu.csv", "visual_memory.csv"
NOT_MEASURED = ["Not measured yet: `python -m benchmarks affine visual` does it."]
TARGET_SHAPE, TARGET = "64x256x56x56", 2.5
HEAP = "peak as it comes"
MEMORY_TARGET = 0.5
"""Of what eager saves, for RN50 in float32."""
NO_GAIN = 1.05
"""Less than that many times faster is not worth a patch."""

STEP_CONTENDERS = ("patched", "eager", "compile")
LAYERS = {
    "bn": "`frozen_batch_norm`",
    "bn+relu": "with ReLU",
    "bn+add+relu": "with addition and ReLU",
    "affine": "`channel_affine`, `dim=-1`",
    "layer_norm": "`layer_norm`",
}
OPERATIONS = {
    "ChannelAffineFunction": "our affine layer",
    "NativeLayerNorm": "layer norm",
    "NativeBatchNorm": "batch norm",
    "CudnnBatchNorm": "batch norm",
    "Convolution": "convolution",
    "FrozenConvolutionFunction": "our convolution",
    "ConvolutionNormFunction": "our convolution with norm",
    "AvgPool2D": "average pool",
    "Relu": "ReLU",
    "Gelu": "GELU",
    "Addmm": "linear",
    "Mul": "multiplication",
    "ScaledDotProductFlashAttentionForCpu": "attention",
}
"""Autograd's name of an operation to ours."""

Key = tuple[str, ...]


@dataclass(frozen=True)
class Times:
    """Median microseconds by case and contender, of one CSV."""

    header: dict[str, str]
    cases: dict[Key, dict[str, float]]


def read_times(name: str, keys: tuple[str, ...], folder: Path | None = None) -> Times:
    header, rows = results_file.read(name, folder)
    cases: dict[Key, dict[str, float]] = {}
    for row in rows:
        case = cases.setdefault(tuple(row[key] for key in keys), {})
        case[row["contender"]] = float(row["median_us"])
    return Times(header, cases)


def _affine(name: str, folder: Path | None) -> Times:
    return read_times(name, ("op", "shape", "layout", "dtype"), folder)


def _steps(folder: Path | None) -> Times:
    return read_times(STEP, ("model", "batch", "layout", "dtype"), folder)


def layer_cells(key: Key) -> list[str]:
    op, shape, layout, dtype = key
    return [LAYERS[op], shape.replace("x", " x "), layout, dtype]


def tower_cells(key: Key) -> list[str]:
    return [*key[:3], "bfloat16 autocast" if key[3] == "bfloat16" else key[3]]


def _is_target(key: Key) -> bool:
    return key[:2] == ("bn+relu", TARGET_SHAPE) and key[3] == "float32"


def affine_table(name: str, folder: Path | None = None) -> list[str]:
    head = ["layer", "x", "layout", "dtype", "ueo_fast", "(b)", "(c)", "vs (b)", "vs (c)"]
    lines = []
    for key, row in _affine(name, folder).cases.items():
        mine = row["ueo_fast"]
        aimed = name == TUNED and _is_target(key)
        lines.append(
            [
                *layer_cells(key),
                *(markdown.time(row[one]) for one in ("ueo_fast", "eager", "compile")),
                markdown.ratio(row["eager"] / mine, TARGET if aimed else None),
                markdown.ratio(row["compile"] / mine, None),
                f"{100 * row['floor'] / mine:.0f}%",
            ]
        )
    return markdown.table([*head, "of the floor"], lines, words=4)


def beyond_the_floor(times: Times) -> list[str]:
    """Where a target asks for less time than the floor."""
    lines = [
        f"{', '.join(layer_cells(key))} (plain PyTorch takes {row['eager'] / row['floor']:.2f} "
        "times the floor)"
        for key, row in times.cases.items()
        if _is_target(key) and row["eager"] < TARGET * row["floor"]
    ]
    return [f"The target is beyond the floor: {'; '.join(lines) or 'nowhere'}."]


def no_gain(times: Times, ours: str, cells: Callable[[Key], list[str]]) -> list[str]:
    """Two sentences: where ours is not clearly faster than (b), and where than (c)."""
    lines = []
    for other, label in (("eager", "plain PyTorch"), ("compile", "torch.compile")):
        slow = [
            f"{', '.join(cells(key))} ({row[other] / row[ours]:.2f})"
            for key, row in times.cases.items()
            if other in row and row[other] < NO_GAIN * row[ours]
        ]
        lines += [
            "",
            f"Less than {NO_GAIN:g} times as fast as {label}: {'; '.join(slow) or 'nowhere'}.",
        ]
    return lines[1:]


def step_table(folder: Path | None = None) -> list[str]:
    head = ["tower", "batch", "layout", "dtype", "patched", "unpatched", "`torch.compile` of it"]
    lines = [
        [
            *tower_cells(key),
            *(markdown.time(row[name]) if name in row else "-" for name in STEP_CONTENDERS),
            *(
                f"{row[name] / row['patched']:.2f}" if name in row else "-"
                for name in STEP_CONTENDERS[1:]
            ),
        ]
        for key, row in _steps(folder).cases.items()
    ]
    return markdown.table([*head, "vs unpatched", "vs compile"], lines, words=4)


def _bytes(folder: Path | None) -> dict[Key, dict[str, dict[str, int]]]:
    """By case, contender and quantity."""
    found: dict[Key, dict[str, dict[str, int]]] = {}
    for row in results_file.read(MEMORY, folder)[1]:
        case = found.setdefault(
            tuple(row[key] for key in ("model", "batch", "layout", "dtype")), {}
        )
        case.setdefault(row["contender"], {})[row["quantity"]] = int(row["bytes"])
    return found


def _mebibytes(size: float) -> str:
    return f"{size / 2**20:,.0f} MiB" if size >= 10 * 2**20 else f"{size / 2**20:.1f} MiB"


def memory_table(folder: Path | None = None) -> list[str]:
    head = ["tower", "batch", "layout", "dtype"]
    for quantity in ("kept", "peak"):
        head += [f"{quantity}, patched", "unpatched", "everything trained", "patched / unpatched"]
    lines = []
    for key, by_name in _bytes(folder).items():
        cells = tower_cells(key)
        for quantity in ("saved", "peak"):
            sizes = [by_name[name][quantity] for name in ("patched", "eager", "everything")]
            ratio = sizes[0] / sizes[1]
            aimed = quantity == "saved" and key[0] == "RN50" and key[3] == "float32"
            cells += [_mebibytes(size) for size in sizes]
            cells.append(_at_most(ratio, MEMORY_TARGET) if aimed else f"{ratio:.2f}")
        lines.append(cells)
    return markdown.table(head, lines, words=4)


def heap_table(folder: Path | None = None) -> list[str]:
    """The peak with the allocator as a process comes, where it was measured."""
    head = ["tower", "batch", "layout", "dtype", "peak, patched", "unpatched"]
    lines = []
    for key, by_name in _bytes(folder).items():
        sizes = [by_name[name].get(HEAP) for name in ("patched", "eager")]
        if sizes[0] and sizes[1]:
            ratio = f"{sizes[0] / sizes[1]:.2f}"
            lines.append([*tower_cells(key), *map(_mebibytes, sizes), ratio])
    return markdown.table([*head, "patched / unpatched"], lines, words=4)


def _at_most(value: float, target: float) -> str:
    wanted = f"target {target:g}"
    return f"**{value:.2f}** ({wanted})" if value <= target else f"{value:.2f} ({wanted}, missed)"


def _named(kinds: str) -> str:
    return " and ".join(sorted({OPERATIONS.get(kind, kind) for kind in kinds.split(" + ")}))


def kinds_table(model: str, folder: Path | None = None) -> list[str]:
    """What keeps the memory of the first case of a tower, the largest first."""
    by_name = next(found for key, found in _bytes(folder).items() if key[0] == model)
    sizes: dict[str, dict[str, int]] = {}
    for name in ("patched", "eager"):
        for kinds, size in by_name[name].items():
            if kinds not in ("saved", "peak", HEAP):
                of_kind = sizes.setdefault(_named(kinds), {})
                of_kind[name] = of_kind.get(name, 0) + size
    large = {
        kinds: found
        for kinds, found in sizes.items()
        if any(found.get(name, 0) > 0.01 * by_name[name]["saved"] for name in ("patched", "eager"))
    }
    order = sorted(large, key=lambda kinds: -max(large[kinds].values()))
    lines = [
        [kinds, *(_mebibytes(large[kinds].get(name, 0)) for name in ("patched", "eager"))]
        for kinds in order
    ]
    rest = [
        by_name[name]["saved"] - sum(found.get(name, 0) for found in large.values())
        for name in ("patched", "eager")
    ]
    lines.append(["all else", *(_mebibytes(size) for size in rest)])
    lines.append(
        ["together", *(_mebibytes(by_name[name]["saved"]) for name in ("patched", "eager"))]
    )
    return markdown.table(["kept by", "patched", "unpatched"], lines, words=1)


_if_measured = functools.partial(markdown.if_measured, otherwise=NOT_MEASURED)

TABLES: dict[str, Callable[[], list[str]]] = {
    "affine tuned": _if_measured(TUNED, lambda: affine_table(TUNED)),
    "affine no gain": _if_measured(
        TUNED, lambda: no_gain(_affine(TUNED, None), "ueo_fast", layer_cells)
    ),
    "affine beyond the floor": _if_measured(TUNED, lambda: beyond_the_floor(_affine(TUNED, None))),
    "affine provenance": _if_measured(TUNED, lambda: markdown.provenance(TUNED)),
    "affine default": _if_measured(DEFAULT, lambda: affine_table(DEFAULT)),
    "affine default provenance": _if_measured(DEFAULT, lambda: markdown.provenance(DEFAULT)),
    "patch speed": _if_measured(STEP, step_table),
    "patch no gain": _if_measured(STEP, lambda: no_gain(_steps(None), "patched", tower_cells)),
    "patch speed provenance": _if_measured(STEP, lambda: markdown.provenance(STEP)),
    "patch memory": _if_measured(MEMORY, memory_table),
    "patch memory heap": _if_measured(MEMORY, heap_table),
    "patch memory provenance": _if_measured(MEMORY, lambda: markdown.provenance(MEMORY)),
    "patch kinds resnet": _if_measured(MEMORY, lambda: kinds_table("RN50")),
    "patch kinds transformer": _if_measured(MEMORY, lambda: kinds_table("ViT-B-16")),
}
TABLES["patch memory by holder"] = TABLES["patch kinds transformer"]
TABLES["patch time"] = lambda: [*TABLES["patch speed"](), "", *TABLES["patch no gain"]()]
"""By name of the marker; the last two are docs/patch.md's."""
