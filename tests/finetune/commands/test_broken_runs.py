"""Every file of a run folder, broken in many ways: each command says which, and none breaks down.

A run folder may come from somebody else, from another version, or from a disk that failed.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from commands_place import finetune
from photo_folder import KNOWN, picture
from tiny_model_folder import save_tiny_clip

from ueo_fast.cli import main
from ueo_fast.finetune.commands import adapted
from ueo_fast.finetune.commands import finetune as command
from ueo_fast.finetune.demo.digits import load_digits
from ueo_fast.finetune.files import records
from ueo_fast.finetune.files.tensor_file import read_tensors, write_tensors

READ = {
    "score": ("config.json", "delta.safetensors"),
    "evaluate": ("config.json", "delta.safetensors", "images.json"),
    "report": (
        *("config.json", "environment.json", "problem.json", "finished.json", "predictions.csv"),
        *("train.jsonl", "epochs.jsonl", "metrics.jsonl"),
    ),
    "compare": ("config.json", "problem.json", "metrics.jsonl"),
    "resume": (
        *("config.json", "images.json", "zero_shot.safetensors", "checkpoint.safetensors"),
        *("train.jsonl", "epochs.jsonl", "metrics.jsonl"),
    ),
    "resume finished": ("config.json", "finished.json"),
}
"""The files that a command cannot do without, or must not misread."""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A tiny finished run, and one that was stopped between its two steps."""
    place = tmp_path_factory.mktemp("place")
    save_tiny_clip(place / "model")
    digits = load_digits()
    for label, name in enumerate([*KNOWN, "six"]):
        for copied in range(2):
            path = place / "photos" / name / f"{copied}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            picture(digits.images[(digits.labels == label).nonzero()[copied, 0]]).save(path)
    (place / "names.txt").write_text("\n".join(KNOWN))
    words = ["--epochs", "2", "--momentum", "0.9", "--early-stop", "2", "--checkpoint-every", "1"]
    assert finetune(place, "run", *words) == 0
    shutil.copytree(place / "run", place / "stopped")
    for name in ("finished.json", "predictions.csv", "delta.safetensors", "report.html"):
        (place / "stopped" / name).unlink()
    loaded = command.load_clip(str(place / "model"), None, device="cpu")
    with pytest.MonkeyPatch.context() as patch:  # loading it anew takes most of the time
        for module, name in (
            (command, "load_clip"),
            (command, "load_base"),
            (adapted, "load_base"),
        ):
            patch.setattr(module, name, lambda *_, **__: copy.deepcopy(loaded))
        patch.setattr(records, "MOST_BYTES", 2**24)
        patch.setattr(records, "LONGEST_LINE", 2**20)
        yield place


def words_of(name: str, place: Path, run: Path) -> list[str]:
    words: list[object] = {
        "score": ["score", "--run", run, "--data", place / "photos" / "six", "--workers", 0],
        "evaluate": ["evaluate", "--run", run, "--workers", 0],
        "report": ["report", run, "--out", run.parent / "page.html"],
        "compare": ["compare", run],
    }.get(name, ["finetune", "--resume", "--out", run])
    if name == "score":
        words += ["--threshold", 0.2, "--overwrite", "--out", run.parent / "scores.csv"]
    return [str(word) for word in words]


Change = Callable[[Path], None]


def replaced(data: bytes) -> Change:
    return lambda path: (path.unlink(), path.write_bytes(data))[0]


def in_its_place(make: Callable[[Path], Any]) -> Change:
    def change(path: Path) -> None:
        path.unlink()
        make(path)

    return change


def sparse(path: Path) -> None:
    with open(path, "wb") as file:
        file.truncate(6 * 2**30)


def anything(name: str) -> Iterator[tuple[str, Change]]:
    """What is wrong in the place of any file."""
    yield "a folder", in_its_place(lambda path: path.mkdir())
    yield "a pipe", in_its_place(os.mkfifo)
    yield "a file without end", in_its_place(lambda path: path.symlink_to("/dev/zero"))
    yield "6 GB of zeros", in_its_place(sparse)
    yield "bytes", replaced(b"\xff\x00\x9c bytes\n" * 7)
    if not name.endswith(".jsonl"):
        yield "nothing", replaced(b"")
    if name.endswith((".json", ".jsonl")):
        yield "a list", replaced(b"[1]\n")
        yield "deep nesting", replaced(b'{"a": ' * 100_000 + b"\n")
        yield "5,000 digits", replaced(b'{"known": ' + b"9" * 5000 + b"}\n")


ODD_VALUES = (None, [[1]], {"a": {}}, "\x1b[31m", -1, 10**30, float("nan"), 1e999, True, [], 0.5)


def objects(path: Path) -> tuple[list[dict[str, Any]], Callable[[list[dict[str, Any]]], bytes]]:
    """What is in a JSON file, and how it is written back."""
    if path.suffix == ".jsonl":
        return (
            [json.loads(line) for line in path.read_text().splitlines()],
            lambda values: "".join(json.dumps(value) + "\n" for value in values).encode(),
        )
    return [json.loads(path.read_text())], lambda values: json.dumps(values[0]).encode()


def json_changes(path: Path, values_per_key: int) -> Iterator[tuple[str, Change]]:
    """A key that is missing, and values that do not belong there; also one level below."""
    values, written = objects(path)
    yield "a key too many", replaced(written([{**values[0], "later": 1}, *values[1:]]))
    turn = 0
    for key, value in values[0].items():
        rest = {name: one for name, one in values[0].items() if name != key}
        yield f"no {key}", replaced(written([rest, *values[1:]]))
        odd = [*ODD_VALUES, *([value[:-1], [*value, *value]] if isinstance(value, list) else [])]
        for _ in range(values_per_key):
            turn += 1
            new = odd[turn % len(odd)]
            yield f"{key}={new!r:.40}", replaced(written([{**values[0], key: new}, *values[1:]]))
        if isinstance(value, dict):
            for inner in value:
                turn += 1
                new = {**value, inner: ODD_VALUES[turn % len(ODD_VALUES)]}
                yield f"{key}.{inner}", replaced(written([{**values[0], key: new}, *values[1:]]))


def tensor_changes(path: Path) -> Iterator[tuple[str, Change]]:
    """Tensors of the wrong kind, in a file whose checksum fits."""
    data = path.read_bytes()
    yield "cut off", replaced(data[:-100])
    spoiled = bytearray(data)
    spoiled[-300:-250] = bytes(byte ^ 0x55 for byte in spoiled[-300:-250])
    tensors, text = read_tensors(path)
    if "checksum" in text:  # zero_shot.safetensors has none; what its values must be is below
        yield "50 bytes", replaced(bytes(spoiled))
    first = min(tensors)

    def rewritten(new: dict[str, torch.Tensor], metadata: dict[str, str]) -> Change:
        def change(path: Path) -> None:
            path.unlink()
            write_tensors(path, new, metadata, checked="checksum" in text)

        return change

    plain = {key: value for key, value in text.items() if key != "checksum"}
    changes = {
        "NaN": lambda t: t.double().mul(float("nan")).to(t.dtype) if t.is_floating_point() else t,
        "another shape": lambda t: torch.cat([t.reshape(-1), t.reshape(-1)]),
        "another type": lambda t: t.to(torch.int8),
        "a number": lambda t: torch.tensor(1.0),
        "no values": lambda t: t.reshape(-1)[:0],
    }
    for title, change in changes.items():
        name = next(n for n in sorted(tensors) if tensors[n].is_floating_point())
        yield title, rewritten({**tensors, name: change(tensors[name])}, plain)
    yield "one too few", rewritten({n: t for n, t in tensors.items() if n != first}, plain)
    if "checksum" in text:
        yield "one too many", rewritten({**tensors, "later": torch.ones(2)}, plain)
    for key in plain:
        rest = {name: value for name, value in plain.items() if name != key}
        yield f"no {key}", rewritten(tensors, rest)
        yield f"odd {key}", rewritten(tensors, {**plain, key: "[[["})
    if "values" in plain:
        values = json.loads(plain["values"])
        for key in values:
            for new in (None, [1], {"a": "b"}, "x", -1, 10**30):
                forged = json.dumps({**values, key: new})
                yield f"{key}={new!r}", rewritten(tensors, {**plain, "values": forged})


_SOME = 6
"""Values per command and file that are tried where not every one is."""


def problems(
    name: str, place: Path, file: str, folder: Path, capsys: Any, every: bool
) -> Iterator[str]:
    """What a command does wrong where ``file`` is broken, one line each."""
    source = place / ("stopped" if name == "resume" else "run")
    changes = [(True, *change) for change in anything(file)]
    several: list[tuple[bool, str, Change]] = []
    if file.endswith((".json", ".jsonl")):
        many = len(ODD_VALUES) if every else 1
        several = [(False, *change) for change in json_changes(source / file, many)]
    if file.endswith(".safetensors"):
        # A suffix or a version may be any text, and some odd values are those that were there.
        several = [
            ("odd" not in c[0] and "=" not in c[0], *c) for c in tensor_changes(source / file)
        ]
    if not every:
        start = zlib.crc32(f"{name} {file}".encode())
        several = several[start % 7 :: max(1, len(several) // _SOME)]
    for number, (fatal, title, change) in enumerate(changes + several):
        run = folder / str(number) / "run"
        shutil.copytree(source, run)
        change(run / file)
        yield from problem_of(words_of(name, place, run), capsys, file, title, fatal)
        shutil.rmtree(run.parent)


_OTHER = "there are no metrics from its end"  # of the method that config.json names now


def problem_of(words: list[str], capsys: Any, file: str, title: str, fatal: bool) -> Iterator[str]:
    capsys.readouterr()
    try:
        status = main(words)
    except BaseException as error:
        yield f"{title}: {type(error).__name__}: {error!s:.200}"
        return
    text = capsys.readouterr().err
    if status not in (0, 1, 2) or "Traceback" in text:
        yield f"{title}: status {status}: {text[-300:]}"
    elif status and not any(part in text for part in (file, title.partition("=")[0], _OTHER)):
        yield f"{title}: does not name the file: {text[-300:]}"
    elif "\x1b[31m" in text:
        yield f"{title}: prints what a terminal obeys: {text[-300:]!r}"
    elif not status and fatal:
        yield f"{title}: is not noticed"


DRAWN = ("train.jsonl", "metrics.jsonl", "predictions.csv")
"""Whose values are in charts."""
CASES = [(name, file) for name, files in READ.items() for file in files]


@pytest.mark.parametrize(("name", "file"), CASES, ids=["-".join(case) for case in CASES])
def test_a_broken_file_is_named(place, tmp_path, capsys, request, name, file):
    if file not in DRAWN:
        request.getfixturevalue("without_charts")
    found = list(problems(name, place, file, tmp_path, capsys, every=False))
    assert not found, "\n".join(found)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "file"), CASES, ids=["-".join(case) for case in CASES])
def test_a_broken_file_is_named_with_every_value(place, tmp_path, capsys, name, file):
    found = list(problems(name, place, file, tmp_path, capsys, every=True))
    assert not found, "\n".join(found)


STEERING = "\x1b]0;x\x07\r\x9b\u202e"


@pytest.mark.parametrize(
    ("name", "file", "change"),
    [
        ("compare", "config.json", lambda value: {**value, "data": "photos" + STEERING}),
        ("compare", "problem.json", lambda value: {**value, "unknown": [STEERING]}),
        ("compare", "metrics.jsonl", lambda value: {**value, "title": STEERING}),
        (
            *("evaluate", "images.json"),
            lambda value: {**value, "train": {**value["train"], "note": STEERING}},
        ),
    ],
)
def test_no_text_of_a_run_steers_the_terminal(place, tmp_path, capsys, name, file, change):
    """Notes, titles and paths of a run that somebody shared are printed, but not obeyed."""
    run = Path(shutil.copytree(place / "run", tmp_path / "run"))
    values, written = objects(run / file)
    (run / file).write_bytes(written([change(values[0]), *values[1:]]))
    beside = [str(place / "run")] if name == "compare" else []
    capsys.readouterr()
    assert main([*words_of(name, place, run), *beside]) == 0
    said = capsys.readouterr().out
    assert r"\x1b]0;x\x07\r\x9b\u202e" in said
    assert not set(STEERING[:1] + STEERING[-3:]) & set(said)
