"""The tables of layers, towers, training steps and loading on a CPU, for README and docs/*.md."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from benchmarks import tables as t
from benchmarks.step_cases import CASES, CONTENDERS, PARTS
from benchmarks.tables import LAYER, LAYER_KEYS, TOWER, TOWER_KEYS, Line, Target


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{1000 * value:.1f} ms"


def _mebibytes(size: float) -> str:
    return f"{size / 2**20:,.0f} MiB" if size >= 10 * 2**20 else f"{size / 2**20:.1f} MiB"


# ---- The affine layers and the patched towers ---------------------------------------------------

LAYERS_TUNED, LAYERS_DEFAULT = (f"affine_cpu_{name}_allocator.csv" for name in ("tuned", "default"))
PATCH_STEP, PATCH_MEMORY = "visual_step_cpu.csv", "visual_memory.csv"
TARGET_SHAPE, LAYER_TARGET = "64x256x56x56", 2.5
HEAP = "peak as it comes"
MEMORY_TARGET = 0.5
"""At most this share of what eager PyTorch saves, for RN50 in float32."""
NO_GAIN = 1.05
"""A patch that is less than this many times as fast gains no time."""
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
"""Autograd's names of operations, and ours."""

_layers = t.by_case(LAYER_KEYS, "median_us")
_steps = t.by_case(TOWER_KEYS, "median_us")
_sizes = t.by_case(TOWER_KEYS, "bytes", who=lambda row: f"{row['contender']} {row['quantity']}")


def _layer_target(line: Line) -> float | None:
    aimed = (line["op"], line["shape"], line["dtype"]) == ("bn+relu", TARGET_SHAPE, "float32")
    return LAYER_TARGET if aimed else None


def _layer_times(csv: str, target: Target | None) -> t.Text:
    return t.table(csv, _layers, *LAYER, *t.times_on_a_cpu(target, None), t.OF_THE_FLOOR)


def _case(columns: Sequence[t.Column], line: Line) -> str:
    return ", ".join(column.cell(line) for column in columns)


def _beyond_the_floor(folder: Path) -> list[str]:
    """Say where a target asks for less time than the floor."""
    lines = [
        f"{_case(LAYER, line)} (plain PyTorch takes {line['eager'] / line['floor']:.2f} "
        "times the floor)"
        for line in _layers(LAYERS_TUNED, folder)
        if (target := _layer_target(line)) and line["eager"] < target * line["floor"]
    ]
    return [f"The target is beyond the floor: {'; '.join(lines) or 'nowhere'}."]


def _no_gain(csv: str, lines: t.Lines, ours: str, columns: Sequence[t.Column]) -> t.Text:
    """Say where ours is not clearly faster than (b), and where not than (c)."""

    def draw(folder: Path) -> list[str]:
        said = []
        for other, label in (("eager", "plain PyTorch"), ("compile", "torch.compile")):
            slow = [
                f"{_case(columns, line)} ({line[other] / line[ours]:.2f})"
                for line in lines(csv, folder)
                if other in line and line[other] < NO_GAIN * line[ours]
            ]
            places = "; ".join(slow) or "nowhere"
            said += ["", f"Less than {NO_GAIN:g} times as fast as {label}: {places}."]
        return said[1:]

    return t.Text(csv, draw)


def _rn50_target(line: Line) -> float | None:
    return MEMORY_TARGET if (line["model"], line["dtype"]) == ("RN50", "float32") else None


def _memory(
    label: str, quantity: str, target: Target | None = None, most: bool = True
) -> list[t.Column]:
    ours, theirs, everything = (f"{name} {quantity}" for name in ("patched", "eager", "everything"))
    shown = [f"{label}, patched={ours}", f"unpatched={theirs}", f"everything trained={everything}"]
    saved = t.ratio("patched / unpatched", ours, theirs, target, digits=2, at_most=True)
    return [*t.numbers(_mebibytes, *(shown if most else shown[:2])), saved]


def _on_the_heap(csv: str, folder: Path) -> list[Line]:
    both = {f"patched {HEAP}", f"eager {HEAP}"}
    return [line for line in _sizes(csv, folder) if both <= line.keys()]


def _holders(model: str) -> t.Text:
    """The table of what keeps the memory of a tower's first case, the largest first."""
    both = ("patched", "eager")

    def lines(csv: str, folder: Path) -> list[Line]:
        of_case = next(line for line in _sizes(csv, folder) if line["model"] == model)
        total = {name: of_case[f"{name} saved"] for name in both}
        sizes: dict[str, Counter[str]] = {}
        for key, size in of_case.items():
            name, _, kinds = key.partition(" ")
            if name in both and kinds not in ("saved", "peak", HEAP):
                named = sorted({OPERATIONS.get(kind, kind) for kind in kinds.split(" + ")})
                sizes.setdefault(" and ".join(named), Counter())[name] += size
        large = [
            {"kinds": kinds, **{name: found[name] for name in both}}
            for kinds, found in sizes.items()
            if any(found[name] > 0.01 * total[name] for name in both)
        ]
        large.sort(key=lambda line: -max(line[name] for name in both))
        rest = {name: total[name] - sum(line[name] for line in large) for name in both}
        return [*large, {"kinds": "all else", **rest}, {"kinds": "together", **total}]

    shown = t.numbers(_mebibytes, "patched", "unpatched=eager")
    return t.table(PATCH_MEMORY, lines, *t.words("kept by=kinds"), *shown)


_patch_speed = t.table(
    PATCH_STEP,
    _steps,
    *TOWER,
    *t.numbers(t.time, "patched", "unpatched=eager", "`torch.compile` of it=compile"),
    t.ratio("vs unpatched", "eager", "patched", digits=2),
    t.ratio("vs compile", "compile", "patched", digits=2),
)
_patch_no_gain = _no_gain(PATCH_STEP, _steps, "patched", TOWER)

AFFINE_TABLES = t.measured_by(
    "`python -m benchmarks affine visual`",
    {
        "affine tuned": _layer_times(LAYERS_TUNED, _layer_target),
        "affine no gain": _no_gain(LAYERS_TUNED, _layers, "ueo_fast", LAYER),
        "affine beyond the floor": t.Text(LAYERS_TUNED, _beyond_the_floor),
        "affine provenance": LAYERS_TUNED,
        "affine default": _layer_times(LAYERS_DEFAULT, None),
        "affine default provenance": LAYERS_DEFAULT,
        "patch speed": _patch_speed,
        "patch no gain": _patch_no_gain,
        "patch time": t.Text(
            PATCH_STEP, lambda at: [*_patch_speed.draw(at), "", *_patch_no_gain.draw(at)]
        ),
        "patch speed provenance": PATCH_STEP,
        "patch memory": t.table(
            PATCH_MEMORY,
            _sizes,
            *TOWER,
            *_memory("kept", "saved", _rn50_target),
            *_memory("peak", "peak"),
        ),
        "patch memory heap": t.table(
            PATCH_MEMORY, _on_the_heap, *TOWER, *_memory("peak", HEAP, most=False)
        ),
        "patch memory provenance": PATCH_MEMORY,
        "patch kinds resnet": _holders("RN50"),
        "patch kinds transformer": _holders("ViT-B-16"),
        "patch memory by holder": _holders("ViT-B-16"),
    },
)


# ---- The whole step -----------------------------------------------------------------------------

STEP, STEP_TEXT = "step_cpu.csv", "step_text_cpu.csv"
STEP_TARGET = 2.4
WHOLE = "whole step"
TEXTS = ("packed", "cut", "whole")
NAMES = {"ueo_fast": "ueo_fast", "authors": "the authors'"}


def _whole_steps(csv: str, folder: Path) -> list[Line]:
    """By model and batch, with a value per contender and part."""
    keys = ("model", "batch", "classes")
    lines = t.by_case(keys, "median_s", who=lambda row: f"{row['contender']} {row['part']}")
    return sorted(lines(csv, folder), key=lambda line: (line["model"], int(line["batch"])))


def _step_parts(csv: str, folder: Path) -> list[Line]:
    return [
        {**line, "step of": NAMES[name], **{part: line[f"{name} {part}"] for part in PARTS}}
        for line in _whole_steps(csv, folder)
        for name in CONTENDERS
    ]


def _missed(folder: Path) -> list[str]:
    """Say where the target is missed, with the share of what both contenders do alike."""
    lines = _whole_steps(STEP, folder)
    slow = []
    for line in lines:
        theirs = line[f"authors {WHOLE}"]
        faster = theirs / line[f"ueo_fast {WHOLE}"]
        if faster < STEP_TARGET:
            image = sum(line[f"authors {part}"] for part in ("image forward", "image backward"))
            slow.append(
                f"{line['model']} at batch {line['batch']} ({faster:.2f}; the image tower alone is "
                f"{100 * image / theirs:.0f}% of the authors' step, so that a step without "
                f"any text would be {theirs / image:.2f} times as fast as theirs)"
            )
    measured = {(line["model"], line["batch"]) for line in lines}
    absent = [
        f"{case.model} at batch {case.batch}"
        for case in CASES
        if (case.model, str(case.batch)) not in measured
    ]
    sentence = f"Less than {STEP_TARGET:g} times as fast: {'; '.join(slow) or 'nowhere'}."
    return [f"{sentence} Not measured: {', '.join(absent)}." if absent else sentence]


_step_times = t.numbers(_seconds, *(f"{NAMES[name]}={name} {WHOLE}" for name in CONTENDERS))

STEP_TABLES = t.measured_by(
    "`python -m benchmarks step`",
    {
        "step in short": t.table(
            STEP,
            _whole_steps,
            *t.words("tower=model"),
            *t.numbers(str, "batch"),
            *_step_times,
            t.ratio("times faster", f"authors {WHOLE}", f"ueo_fast {WHOLE}"),
        ),
        "step speed": t.table(
            STEP,
            _whole_steps,
            *t.words("tower=model"),
            *t.numbers(str, "batch", "classes"),
            *_step_times,
            t.ratio("times faster", f"authors {WHOLE}", f"ueo_fast {WHOLE}", STEP_TARGET),
        ),
        "step missed": t.Text(STEP, _missed),
        "step parts": t.table(
            STEP,
            _step_parts,
            *t.words("tower=model", "batch", "step of"),
            *t.numbers(_seconds, *PARTS),
        ),
        "step provenance": STEP,
        "step text": t.table(
            STEP_TEXT,
            t.by_case(("classes",), "median_us", "rows"),
            *t.numbers(str, "classes"),
            *t.numbers("{:.0f}".format, *(f"positions, {name}={name} rows" for name in TEXTS)),
            *t.numbers(lambda us: _seconds(us / 1e6), *TEXTS),
            *(t.ratio(f"vs {name}", name, "packed") for name in TEXTS[1:]),
        ),
        "step text provenance": STEP_TEXT,
    },
)


# ---- Loading images, and a run on photographs ---------------------------------------------------

INPUT, INPUT_RUN = "input_cpu.csv", "input_run_cpu.csv"
INPUT_KEYS = ("megapixels", "view", "images", "kb")
PHOTOS = 10_000
INPUT_TARGETS = {
    **{("12", "first pass"): 5.0, ("2", "first pass"): 2.0},
    **{("12", "later epochs"): 25.0, ("2", "later epochs"): 4.0, ("0.2", "later epochs"): 1.5},
}
"""Design targets: times as fast as the authors' loading."""


def _rates(csv: str, folder: Path) -> list[Line]:
    """With images per second, and the seconds that many photographs take."""
    lines = t.by_case(INPUT_KEYS, "median_us")(csv, folder)
    for line in lines:
        for name in ("ueo_fast", "authors", "tensors"):
            line[f"{name} rate"] = 1e6 * int(line["images"]) / line[name]
            line[f"{name} wait"] = PHOTOS / line[f"{name} rate"]
    return lines


def _wait(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"


def _input_target(line: Line) -> float | None:
    return INPUT_TARGETS.get((line["megapixels"], line["view"]))


INPUT_TABLES = t.measured_by(
    "`python -m benchmarks input`",
    {
        "input": t.table(
            INPUT,
            _rates,
            *t.words("megapixels", "kB=kb", "view"),
            *t.numbers("{:.1f}".format, "ueo_fast=ueo_fast rate", "the authors'=authors rate"),
            *t.numbers("{:.1f}".format, "torchvision's tensors=tensors rate"),
            t.ratio("vs the authors'", "authors", "ueo_fast", _input_target),
            t.ratio("vs tensors", "tensors", "ueo_fast"),
        ),
        "input provenance": INPUT,
        "input expectation": t.table(
            INPUT,
            _rates,
            *t.words("megapixels", "=view"),
            *t.numbers(_wait, "ueo_fast=ueo_fast wait", "the authors' loading=authors wait"),
        ),
        "input run": t.table(
            INPUT_RUN,
            t.by_row,
            *t.words("loading"),
            *t.numbers(
                lambda seconds: f"{float(seconds):.1f} s",
                *("first pass=first_s", "the last epoch=epoch_s", "the whole run=run_s"),
            ),
        ),
        "input run provenance": INPUT_RUN,
    },
)

TABLES = {**AFFINE_TABLES, **STEP_TABLES, **INPUT_TABLES}
"""By the marker in the docs."""
