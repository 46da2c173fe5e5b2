"""Files that are no deltas, by accident or intent: one kind of error, which names the file."""

from __future__ import annotations

import json
import os
import pickle
import random
import struct
import zipfile
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

pytest.importorskip("open_clip")

from delta_problem import disturb, zero_shot
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ueo_fast.finetune.clip import delta as delta_module
from ueo_fast.finetune.clip.base_model import describe_base
from ueo_fast.finetune.clip.delta import Delta, DeltaError, load_delta, read_delta, save_delta
from ueo_fast.finetune.demo.tiny_clip import tiny_tokenizer
from ueo_fast.finetune.files.tensor_file import read_tensors, write_tensors


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("delta") / "delta.safetensors"
    classifier = disturb(zero_shot())
    base = describe_base(classifier.model, "RN50", "openai")
    return save_delta(path, classifier, base, method="ueo").read_bytes()


def split(data: bytes) -> tuple[dict[str, Any], bytes]:
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def join(header: dict[str, Any], payload: bytes) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + payload


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return (open, ("exploded", "w"))


def with_header(change: Any) -> Any:
    def make(data: bytes) -> bytes:
        header, payload = split(data)
        change(header)
        return join(header, payload)

    return make


def overlap(header: dict[str, Any]) -> None:
    first, second = [name for name in header if name != "__metadata__"][:2]
    header[second]["data_offsets"] = header[first]["data_offsets"]


def huge_shape(header: dict[str, Any]) -> None:
    header["visual.bn1.weight"]["shape"] = [2**62, 2**62]


def negative_shape(header: dict[str, Any]) -> None:
    header["visual.bn1.weight"]["shape"] = [-8]


def unknown_dtype(header: dict[str, Any]) -> None:
    header["visual.bn1.weight"]["dtype"] = "F33"


def other_dtype(header: dict[str, Any]) -> None:
    header["visual.bn1.weight"]["dtype"] = "I32"


def number_as_metadata(header: dict[str, Any]) -> None:
    header["__metadata__"]["seed"] = 3


def edited(header: dict[str, Any]) -> None:
    header["__metadata__"]["class_names"] = '["dog", "great wall", "t-shirt"]'


def add_tensor(header: dict[str, Any]) -> None:
    header["zzz"] = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}


def renamed(header: dict[str, Any]) -> None:
    header["visual.bn1.weights"] = header.pop("visual.bn1.weight")


HOSTILE = {
    "empty": (lambda data: b"", "is empty"),
    "seven bytes": (lambda data: data[:7], "no readable safetensors"),
    "cut off in the header": (lambda data: data[:100], "no readable safetensors"),
    "cut off in the tensors": (lambda data: data[:-1], "no readable safetensors"),
    "too long": (lambda data: data + b"\0", "no readable safetensors"),
    "a header length of 2^64 - 1": (lambda data: b"\xff" * 8 + data[8:], "no readable safetensors"),
    "a header length of 99 MB": (
        lambda data: struct.pack("<Q", 99_000_000) + data[8:],
        "no readable safetensors",
    ),
    "no JSON": (lambda data: data[:8] + b"x" + data[9:], "no readable safetensors"),
    "JSON of another kind": (lambda data: struct.pack("<Q", 2) + b"[]", "no readable safetensors"),
    "no tensors": (lambda data: struct.pack("<Q", 2) + b"{}", "format is None"),
    "no metadata": (with_header(lambda header: header.pop("__metadata__")), "format is None"),
    "a number as metadata": (with_header(number_as_metadata), "no readable safetensors"),
    "edited metadata": (with_header(edited), "damaged or was edited"),
    "overlapping tensors": (with_header(overlap), "no readable safetensors"),
    "a shape that overflows": (with_header(huge_shape), "no readable safetensors"),
    "a negative shape": (with_header(negative_shape), "no readable safetensors"),
    "an unknown dtype": (with_header(unknown_dtype), "no readable safetensors"),
    "another dtype of the same size": (with_header(other_dtype), "damaged or was edited"),
    "an added tensor": (with_header(add_tensor), "damaged or was edited"),
    "a renamed tensor": (with_header(renamed), "damaged or was edited"),
    "a flipped bit in a tensor": (
        lambda data: data[:-1] + bytes([data[-1] ^ 1]),
        "damaged or was edited",
    ),
    "a pickle": (lambda data: pickle.dumps(Bomb()), "probably a pickle, which can run any program"),
    "text": (lambda data: b"hello, this is a list of classes\n" * 20, "no readable safetensors"),
    "a checkpoint": (
        lambda data: safetensors.torch.save({"step": torch.ones(1)}, {"format": "pt"}),
        "safetensors file but no delta: format is 'pt'",
    ),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_no_delta(tmp_path, monkeypatch, good, kind):
    make, message = HOSTILE[kind]
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "odd.safetensors"
    path.write_bytes(make(good))
    with pytest.raises(DeltaError, match=message) as caught:
        read_delta(path)
    assert str(path) in str(caught.value)
    assert os.listdir(tmp_path) == ["odd.safetensors"]  # nothing in it was run


def test_a_zip_a_torch_file_and_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with zipfile.ZipFile("a.safetensors", "w") as archive:
        archive.writestr("data.pkl", pickle.dumps(Bomb()))
    torch.save({"x": Bomb()}, "b.safetensors")
    for name in ("a.safetensors", "b.safetensors"):
        with pytest.raises(DeltaError, match=f"{name} is no readable .*a zip.*is not opened"):
            read_delta(name)
    with pytest.raises(DeltaError, match="is a folder; give the file in it"):
        read_delta(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"missing.safetensors"):
        read_delta("missing.safetensors")
    assert not Path("exploded").exists()


def test_a_file_that_is_far_too_large_is_not_read(tmp_path, monkeypatch, good):
    path = tmp_path / "large.safetensors"
    path.write_bytes(good)
    monkeypatch.setattr(delta_module, "_LIMIT", 1000)
    with pytest.raises(DeltaError, match=r"bytes, and such a file has at most 1,000"):
        read_delta(path)


def assert_whole_or_refused(path: Path, data: bytes, truth: Delta) -> None:
    path.write_bytes(data)
    try:
        found = read_delta(path)
    except DeltaError:  # anything else fails the test
        return
    for name in ("base", "class_names", "context_words", "suffix", "scope", "method", "extra"):
        assert getattr(found, name) == getattr(truth, name)
    assert found.tensors.keys() == truth.tensors.keys()
    assert all(torch.equal(found.tensors[name], value) for name, value in truth.tensors.items())


@settings(
    max_examples=300,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(data=st.data())
def test_random_damage_is_seen(tmp_path, good, data):
    path = tmp_path / "delta.safetensors"
    path.write_bytes(good)
    truth = read_delta(path)
    (length,) = struct.unpack("<Q", good[:8])
    # The header is a tenth of the file and has all the structure, so most of the damage goes there.
    place = st.one_of(st.integers(0, 7), st.integers(8, 7 + length), st.integers(0, len(good) - 1))
    damaged = bytearray(good)
    for position, bit in data.draw(st.lists(st.tuples(place, st.integers(0, 7)), max_size=4)):
        damaged[position] ^= 1 << bit
    end = data.draw(st.one_of(st.none(), st.integers(0, len(good))))
    assert_whole_or_refused(path, bytes(damaged[:end]), truth)


@pytest.mark.slow
def test_much_random_damage_is_seen(tmp_path, good):
    path = tmp_path / "delta.safetensors"
    path.write_bytes(good)
    truth = read_delta(path)
    (length,) = struct.unpack("<Q", good[:8])
    generator = random.Random(0)
    for _ in range(20_000):
        damaged = bytearray(good)
        for _ in range(generator.randint(1, 3)):
            damaged[generator.randrange(8 + length)] = generator.randrange(256)
        assert_whole_or_refused(path, bytes(damaged), truth)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("extra", '{"a":' * 100_000),
        ("class_names", "[" * 100_000),
        ("suffix", " and so on" * 1000),
        ("embed_dim", "9" * 10_000),
        ("seed", "NaN"),
    ],
)
def test_a_forged_field_with_a_right_checksum_is_one_kind_of_error(tmp_path, good, field, value):
    path = tmp_path / "forged.safetensors"
    path.write_bytes(good)
    tensors, values = read_tensors(path)
    forged = {**values, field: value}
    write_tensors(path, tensors, forged, checked=True)
    with pytest.raises(DeltaError, match=r"forged.safetensors"):
        load_delta(zero_shot().model, path, tokenizer=tiny_tokenizer())


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "delta.safetensors")
    with pytest.raises(DeltaError, match="is a pipe, a socket or a device; give a file"):
        read_delta(tmp_path / "delta.safetensors")
