"""Whole files or none: full disks, read-only folders, killed processes, lines that are cut off."""

from __future__ import annotations

import errno
import io
import os
import resource
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from ueo_fast.finetune.files import atomic, run_folder
from ueo_fast.finetune.files.atomic import atomic_file
from ueo_fast.finetune.files.run_folder import RunFolder
from ueo_fast.finetune.files.tensor_file import TensorFileError, read_tensors, write_tensors


@pytest.fixture
def small_files() -> Iterator[None]:
    """The system refuses to let any file grow beyond 4096 bytes: a full disk for everybody."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    signal.signal(signal.SIGXFSZ, before)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 kB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("there is no mount command")
    if done.returncode != 0:
        pytest.skip(f"mounting is not allowed here: {done.stderr.strip()}")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def test_a_file_appears_whole_when_the_block_ends(tmp_path):
    path = tmp_path / "a"
    with atomic_file(path) as file:
        file.write(b"new")
        file.flush()
        assert names(tmp_path) == [".a.partial"]
    assert path.read_bytes() == b"new"
    assert names(tmp_path) == ["a"]


@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt])
def test_a_block_that_raises_changes_nothing(tmp_path, kind):
    path = tmp_path / "a"
    path.write_bytes(b"old")

    def write() -> None:
        with atomic_file(path) as file:
            file.write(b"new")
            raise kind

    with pytest.raises(kind):
        write()
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["a"]


def test_an_error_about_another_file_is_left_alone(tmp_path):
    def write() -> None:
        with atomic_file(tmp_path / "a") as file:
            file.write((tmp_path / "missing.jpg").read_bytes())

    with pytest.raises(FileNotFoundError, match=r"missing.jpg") as caught:
        write()
    assert "could not be written" not in str(caught.value)
    assert names(tmp_path) == []


def test_a_missing_folder_is_named(tmp_path):
    path = tmp_path / "nowhere" / "a"
    with (
        pytest.raises(FileNotFoundError, match=r"nothing was written.*nowhere/a") as caught,
        atomic_file(path),
    ):
        pass
    assert caught.value.filename == str(path)


def test_a_folder_in_the_files_place_is_named(tmp_path):
    (tmp_path / "a").mkdir()
    with (
        pytest.raises(IsADirectoryError, match="could not be written"),
        atomic_file(tmp_path / "a"),
    ):
        pass
    assert names(tmp_path) == ["a"]


@pytest.mark.usefixtures("small_files")
def test_a_file_that_may_not_grow_keeps_the_one_before(tmp_path):
    folder = RunFolder(tmp_path)
    folder.write_json("config.json", {"a": 1})
    write_tensors(folder.path / "t.safetensors", {"x": torch.ones(3)})
    folder.write_csv("p.csv", ["a"], [["1"]])
    folder.append_json_line("train.jsonl", {"step": 1})
    before = {name: (tmp_path / name).read_bytes() for name in names(tmp_path)}
    for write in (
        lambda: folder.write_json("config.json", {"a": "x" * 5000}),
        lambda: write_tensors(folder.path / "t.safetensors", {"x": torch.ones(3000)}),
        lambda: folder.write_csv("p.csv", ["a"], [["x" * 100]] * 100),
        lambda: folder.append_json_line("train.jsonl", {"step": "x" * 5000}),
        lambda: folder.append_json_line("new.jsonl", {"step": "x" * 5000}),
    ):
        with pytest.raises(OSError, match="could not be written") as caught:
            write()
        assert caught.value.errno == errno.EFBIG
        assert Path(caught.value.filename).parent == tmp_path
    assert {name: (tmp_path / name).read_bytes() for name in names(tmp_path)} == before
    folder.append_json_line("train.jsonl", {"step": 2})
    assert folder.read_json_lines("train.jsonl") == [{"step": 1}, {"step": 2}]


def test_a_full_disk_keeps_everything(small_disk):
    folder = RunFolder(small_disk)
    folder.write_json("config.json", {"a": 1})
    write_tensors(folder.path / "t.safetensors", {"x": torch.ones(3)})
    reported = []

    def fill() -> None:
        for step in range(1000):
            folder.append_json_line("train.jsonl", {"step": step, "text": "x" * 999})
            reported.append(step)

    message = r"No space left on device\); what was there before is kept: '.*train.jsonl'"
    with pytest.raises(OSError, match=message) as caught:
        fill()
    assert caught.value.errno == errno.ENOSPC
    assert len(reported) > 30
    assert [record["step"] for record in folder.read_json_lines("train.jsonl")] == reported
    with pytest.raises(OSError, match=r"No space left on device.*t.safetensors"):
        write_tensors(folder.path / "t.safetensors", {"x": torch.ones(30000)})
    assert torch.equal(read_tensors(folder.path / "t.safetensors")[0]["x"], torch.ones(3))
    assert names(small_disk) == ["config.json", "t.safetensors", "train.jsonl"]


def test_a_read_only_file_system_is_told(small_disk):
    folder = RunFolder(small_disk)
    folder.write_json("config.json", {"a": 1})
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    for write in (
        lambda: folder.write_json("config.json", {"a": 2}),
        lambda: folder.append_json_line("train.jsonl", {"step": 1}),
    ):
        with pytest.raises(OSError, match="Read-only file system") as caught:
            write()
        assert caught.value.errno == errno.EROFS
    assert folder.read_json("config.json", dict) == {"a": 1}


@pytest.mark.parametrize("call", ["write", "flush", "fsync", "replace", "close"])
@pytest.mark.parametrize("size", [10, 10**6])
def test_a_disk_that_is_full_at_any_moment_is_told_with_the_name(tmp_path, monkeypatch, call, size):
    """The system's own error names no file: the buffer is written wherever it is flushed."""
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    failed = []

    class Raw(io.FileIO):
        def write(self, data):
            if call in ("write", "flush"):
                failed.append(call)
                raise full
            return super().write(data)

        def close(self):
            was_open = not self.closed
            super().close()
            if call == "close" and was_open:
                failed.append(call)
                raise full

    def fail(*_):
        failed.append(call)
        raise full

    def buffered(path, mode, opener):
        return io.BufferedWriter(Raw(path, mode, opener=opener))

    folder = RunFolder(tmp_path)
    path = folder.write_text("a", "old")
    with monkeypatch.context() as patched:
        patched.setattr(atomic, "open", buffered, raising=False)
        if call in ("fsync", "replace"):
            patched.setattr(os, call, fail)
        with pytest.raises(OSError, match="No space left on device") as caught:
            folder.write_text("a", "x" * size)
    assert failed
    assert caught.value.errno == errno.ENOSPC
    assert caught.value.filename == str(path)
    assert path.read_text() == ("x" * size if call == "close" else "old")
    assert names(tmp_path) == ["a"]


def test_a_line_that_is_written_in_pieces_is_whole(tmp_path, monkeypatch):
    """As at the last bytes of a disk, of which somebody frees more at that moment."""

    class Raw(io.FileIO):
        def write(self, data):
            return super().write(bytes(data)[:7])

    monkeypatch.setattr(
        run_folder,
        "open",
        lambda path, mode, opener, **_: Raw(path, mode, opener=opener),
        raising=False,
    )
    folder = RunFolder(tmp_path)
    for step in (1, 2):
        folder.append_json_line("train.jsonl", {"step": step, "text": "x" * 50})
    monkeypatch.undo()
    assert [record["step"] for record in folder.read_json_lines("train.jsonl")] == [1, 2]


def test_a_link_in_the_place_of_a_file_leads_nowhere(tmp_path):
    """A run folder may come from somebody else, and what it links to be ours."""
    mine, run = tmp_path / "mine.txt", tmp_path / "run"
    mine.write_text("mine")
    run.mkdir()
    for name in ("config.json", ".config.json.partial", "train.jsonl"):
        (run / name).symlink_to(mine)
    folder = RunFolder(run)
    folder.write_json("config.json", {"a": 1})
    assert folder.read_json("config.json", dict) == {"a": 1}
    with pytest.raises(OSError, match=r"it is a link to another file: remove it.*train.jsonl"):
        folder.append_json_line("train.jsonl", {"step": 1})
    with RunFolder.resume(run):
        pass
    assert mine.read_text() == "mine"


def test_permission_is_told_as_such(tmp_path, monkeypatch):
    import builtins

    def denied(path, *_, **__):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setattr(builtins, "open", denied)  # root may write anywhere
    with pytest.raises(PermissionError, match=r"Permission denied\); what was .*/config.json'"):
        RunFolder(tmp_path).write_json("config.json", {"a": 1})


def test_a_killed_writer_leaves_the_old_file_and_no_trap(tmp_path):
    path = tmp_path / "config.json"
    path.write_text("{}")
    code = f"""
        import os, signal
        from ueo_fast.finetune.files.atomic import atomic_file
        with atomic_file({str(path)!r}) as file:
            file.write(b"x" * 100_000)
            os.kill(os.getpid(), signal.SIGKILL)
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], env=environment)
    assert done.returncode == -signal.SIGKILL
    assert path.read_text() == "{}"
    assert names(tmp_path) == [".config.json.partial", "config.json"]
    with RunFolder.resume(tmp_path) as folder:
        assert names(tmp_path) == ["config.json"]
        folder.write_json("config.json", {"a": 1})
    assert folder.read_json("config.json", dict) == {"a": 1}


def test_tensors_of_any_layout_come_back(tmp_path):
    base = torch.arange(24.0).reshape(2, 3, 4)
    tensors = {
        "itself": base,
        "a view": base[:, 1],
        "transposed": base.permute(2, 0, 1),
        "expanded": torch.ones(1).expand(5),
        "scalar": torch.tensor(3),
        "none": torch.zeros(0, 4),
        "parameter": torch.nn.Parameter(torch.ones(2, dtype=torch.bfloat16)),
        "mask": torch.tensor([True, False]),
    }
    path = write_tensors(tmp_path / "t.safetensors", tensors, {"what": "ünïcode"})
    found, metadata = read_tensors(path)
    assert metadata == {"what": "ünïcode"}
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(found[name], tensor.detach())
        assert found[name].dtype == tensor.dtype
    path.write_bytes(b"\0" * path.stat().st_size)  # what was read does not follow the file
    assert torch.equal(found["itself"], base)


def test_a_bad_tensor_file_is_named(tmp_path):
    path = tmp_path / "checkpoint.safetensors"
    path.write_bytes(b"")
    with pytest.raises(TensorFileError, match=r"checkpoint.safetensors is empty"):
        read_tensors(path)
    with pytest.raises(FileNotFoundError, match=r"other.safetensors"):
        read_tensors(tmp_path / "other.safetensors")


def test_of_two_writers_the_second_is_refused(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"old")
    with atomic_file(path) as file:
        file.write(b"first")
        message = r"another process is writing it\); what was there before is kept: '.*/a'"
        with pytest.raises(BlockingIOError, match=message), atomic_file(path):
            pytest.fail("two wrote at once")
        file.write(b" and whole")
    assert path.read_bytes() == b"first and whole"
    with atomic_file(path) as file:
        file.write(b"later")
    assert path.read_bytes() == b"later"
    assert names(tmp_path) == ["a"]


def test_many_writers_at_once_leave_a_whole_file(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"d" * 100)  # a writer that is refused reads before there is anything else
    code = f"""
        import os, sys
        from ueo_fast.finetune.files.atomic import atomic_file
        letter = sys.argv[1].encode()
        for length in range(1, 200):
            try:
                with atomic_file({str(path)!r}) as file:
                    for _ in range(length):
                        file.write(letter * 100)
            except BlockingIOError:
                pass
            data = open({str(path)!r}, "rb").read()
            assert data and len(set(data)) == 1 and len(data) % 100 == 0, data
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    writers = [
        subprocess.Popen([sys.executable, "-c", textwrap.dedent(code), letter], env=environment)
        for letter in "abc"
    ]
    assert [writer.wait() for writer in writers] == [0, 0, 0]
    assert names(tmp_path) == ["a"]
