"""Checkpoints on disk, and JSON-lines files after a crash."""

from __future__ import annotations

import builtins
import dataclasses
import errno
import json
import os

import pytest
import torch
from engine_problem import CONFIG, infomax, make_classifier, make_images

from ueo_fast.finetune.engine.checkpoint import SafetensorsCheckpoints
from ueo_fast.finetune.engine.hooks import Checkpoint, Hooks
from ueo_fast.finetune.engine.trainer import train
from ueo_fast.finetune.files import atomic
from ueo_fast.finetune.files.run_folder import RunFolder

PARTIAL = ".checkpoint.safetensors.partial"


def checkpoint(step: int) -> Checkpoint:
    tensors = {
        "adapted/context": torch.randn(4, 3, generator=torch.Generator().manual_seed(step)),
        "objective/seen": torch.tensor([True, False]),
        "count": torch.tensor(step),
        "half": torch.ones(2, dtype=torch.bfloat16),
        "none": torch.zeros(0, 5),
    }
    values = {"a": [1, 2.5, None, "ü"], "third": 1 / 3, "table": {"scale": 65536.0}}
    return Checkpoint(step, tensors, values)


def assert_same(found, expected):
    assert found.step == expected.step
    assert found.values == expected.values
    assert found.tensors.keys() == expected.tensors.keys()
    for name, value in found.tensors.items():
        assert value.dtype == expected.tensors[name].dtype
        assert torch.equal(value, expected.tensors[name])


def test_what_is_saved_is_loaded(tmp_path):
    store = SafetensorsCheckpoints(RunFolder(tmp_path))
    assert store.load() is None
    for step in (1, 2):
        store.save(checkpoint(step))
        assert_same(SafetensorsCheckpoints(tmp_path).load(), checkpoint(step))
    assert os.listdir(tmp_path) == ["checkpoint.safetensors"]


def test_values_that_json_cannot_hold_leave_the_last_one(tmp_path):
    store = SafetensorsCheckpoints(tmp_path)
    store.save(checkpoint(1))
    for value in (float("nan"), object()):
        with pytest.raises((ValueError, TypeError)):
            store.save(dataclasses.replace(checkpoint(2), values={"a": value}))
    assert_same(store.load(), checkpoint(1))


def hostile_files():
    data = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    other = len(data).to_bytes(8, "little") + data + b"\0\0\0\0"
    return {
        "empty": b"",
        "garbage": b"garbage" * 100,
        "header too long": (2**40).to_bytes(8, "little") + b"{}",
        "pickle": b"\x80\x04K\x01.",
        "another safetensors file": other,
    }


@pytest.mark.parametrize("content", hostile_files().values(), ids=hostile_files())
def test_a_damaged_file_says_the_way_out(tmp_path, content):
    store = SafetensorsCheckpoints(tmp_path)
    store.path.write_bytes(content)
    with pytest.raises(ValueError, match=r"checkpoint\.safetensors.*delete it to start this run"):
        store.load()


def test_a_file_that_was_cut_off_anywhere_is_refused(tmp_path):
    store = SafetensorsCheckpoints(tmp_path)
    store.save(checkpoint(1))
    whole = store.path.read_bytes()
    for length in range(0, len(whole), 37):
        store.path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="delete it to start this run anew"):
            store.load()


def test_values_that_are_damaged_are_refused(tmp_path):
    store = SafetensorsCheckpoints(tmp_path)
    store.save(checkpoint(1))
    whole = store.path.read_bytes()
    assert b'"step":"1"' in whole
    for old, new in (
        (b'"step":"1"', b'"step":"x"'),
        (b'"step":"1"', b'"stop":"1"'),
        (b'"step":"1"', b'"step":"2"'),  # a sound file, but for its checksum
        (whole[-20:], bytes(20)),
    ):
        store.path.write_bytes(whole.replace(old, new))
        with pytest.raises(ValueError, match="delete it to start this run anew"):
            store.load()


def test_what_a_killed_process_left_is_ignored_and_replaced(tmp_path):
    store = SafetensorsCheckpoints(tmp_path)
    (tmp_path / PARTIAL).write_bytes(b"half of a checkpo")
    assert store.load() is None
    store.save(checkpoint(1))
    (tmp_path / PARTIAL).write_bytes(b"half of a checkpo")
    assert_same(store.load(), checkpoint(1))
    store.save(checkpoint(2))
    assert_same(store.load(), checkpoint(2))
    assert os.listdir(tmp_path) == ["checkpoint.safetensors"]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_disk_that_fails_at_the_end_leaves_the_last_one(tmp_path, monkeypatch, call):
    store = SafetensorsCheckpoints(tmp_path)
    store.save(checkpoint(1))

    def fail(*args):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patched:
        patched.setattr(os, call, fail)
        with pytest.raises(OSError, match=r"checkpoint\.safetensors|Input/output"):
            store.save(checkpoint(2))
    assert_same(store.load(), checkpoint(1))
    assert os.listdir(tmp_path) == ["checkpoint.safetensors"]


def test_a_read_only_folder_stops_the_run_and_leaves_the_last_one(tmp_path, monkeypatch):
    """Simulated: permission bits do not bind root, who may run the tests."""
    store = SafetensorsCheckpoints(tmp_path)
    images, classifier, contexts = make_images(), make_classifier(), []

    def refuse(path, mode="r", *args, **options):
        if "w" in mode:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        return builtins.open(path, mode, *args, **options)

    def on_step(record):
        contexts.append(classifier.prompt.context.detach().clone())
        if record.step == 3:
            monkeypatch.setattr(atomic, "open", refuse, raising=False)

    config = dataclasses.replace(CONFIG, checkpoint_every=2)
    with pytest.raises(OSError, match=r"Read-only file system.*what was there before is kept"):
        train(
            classifier,
            images,
            infomax(images),
            config=config,
            hooks=Hooks(on_step=on_step, checkpoints=store),
        )
    assert len(contexts) == 4
    assert not classifier.training
    found = store.load()
    assert found.step == 2
    assert torch.equal(found.tensors["adapted/prompt.context"], contexts[1])


def test_a_missing_folder_is_named(tmp_path):
    store = SafetensorsCheckpoints(tmp_path / "gone")
    assert store.load() is None
    with pytest.raises(OSError, match=r"gone/checkpoint\.safetensors"):
        store.save(checkpoint(1))


def write_lines(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def test_lines_after_the_checkpoint_are_dropped(tmp_path):
    path, folder = tmp_path / "train.jsonl", RunFolder(tmp_path)
    folder.drop_json_lines(path.name, "step", 3)
    assert not path.exists()
    write_lines(path, *({"step": step} for step in range(1, 6)), {"other": 1})
    with open(path, "ab") as file:
        file.write(b'{"step": 2, "lo')  # killed while it wrote
    folder.drop_json_lines(path.name, "step", 3)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines == [{"step": 1}, {"step": 2}, {"step": 3}, {"other": 1}]
    before = path.stat().st_ino
    folder.drop_json_lines(path.name, "step", 3)
    assert path.stat().st_ino == before  # not even rewritten


def test_lines_that_are_damaged_are_named(tmp_path):
    path = tmp_path / "train.jsonl"
    for line, what in (("{", "Expecting property name"), ("[1]", "holds a list, expected an obj")):
        path.write_text(f'{{"step": 1}}\n{line}\n')
        with pytest.raises(ValueError, match=rf"train\.jsonl, line 2: {what}"):
            RunFolder(tmp_path).drop_json_lines(path.name, "step", 0)
        assert path.read_text() == f'{{"step": 1}}\n{line}\n'


def test_lines_survive_a_full_disk(tmp_path, monkeypatch):
    path = tmp_path / "train.jsonl"
    write_lines(path, {"step": 1}, {"step": 2})
    before = path.read_bytes()

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        RunFolder(tmp_path).drop_json_lines(path.name, "step", 1)
    assert path.read_bytes() == before
