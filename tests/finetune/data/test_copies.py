"""Copies of images on disk: the same pixels as without them, whatever happens to the files."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import resource
import signal
import sqlite3
import time
import warnings
from collections.abc import Callable
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import pytest
import torch
from real_photos import real_photo, save_jpeg

from ueo_fast.finetune.data import copies as module
from ueo_fast.finetune.data.copies import (
    Copies,
    Picture,
    open_copies,
    read_picture,
    temporary_copies,
)
from ueo_fast.finetune.data.decode import UnreadableImageError
from ueo_fast.finetune.data.image_list import ImageList, read_images
from ueo_fast.finetune.data.loader import tolerant_loader, training_batches
from ueo_fast.finetune.data.transforms import test_transform, training_transform
from ueo_fast.finetune.data.views import ImageDataset, PictureDataset

VIEW = (32, 32)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for number, size in enumerate([(400, 300), (300, 411), (90, 100), (40, 30), (500, 120)]):
        save_jpeg(real_photo(number % 2, size), folder / f"{number}.jpg")
    real_photo(0, (200, 210)).save(folder / "5.png")
    (folder / "broken.jpg").write_bytes(b"\xff\xd8\xff no more")
    return folder


def readable(photos: Path) -> ImageList:
    images = read_images(photos)
    return images.subset([i for i, name in enumerate(images.names) if name != "broken.jpg"])


def same(one: Picture, other: Picture) -> bool:
    return one.size == other.size and torch.equal(one.pixels, other.pixels)


def all_right(copies: Copies, photos: Path) -> bool:
    """Whether every image is read as without copies."""
    paths = readable(photos).paths
    return all(same(copies.read(path, VIEW), read_picture(path, VIEW)) for path in paths)


@pytest.fixture
def opens(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files that are decoded."""
    found: list[str] = []
    whole = module.opened

    def spy(path: str) -> object:
        found.append(path)
        return whole(path)

    monkeypatch.setattr(module, "opened", spy)
    return found


def test_each_file_is_decoded_once(photos: Path, tmp_path: Path, opens: list[str]) -> None:
    copies = Copies(tmp_path / "cache")
    paths = readable(photos).paths
    first = [copies.read(path, VIEW) for path in paths]
    assert opens == list(paths)
    again = [copies.read(path, VIEW) for path in paths]
    assert opens == list(paths)
    for one, other in zip(first, again, strict=True):
        assert same(one, other)
        assert one.pixels.stride() == other.pixels.stride()  # a resizer may go by it
    assert copies.text().startswith(f"{tmp_path / 'cache'} keeps small copies of 6 images (")
    assert copies.stopped is None
    assert same(Copies(tmp_path / "cache").read(paths[0], VIEW), first[0])
    assert len(opens) == len(paths)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("limit", [None, 200_000, 0])
def test_batches_are_the_same_bits(
    photos: Path, tmp_path: Path, workers: int, limit: int | None
) -> None:
    """Without copies, from copies, and where some or none of them could be kept."""
    images = readable(photos)
    copies = Copies(tmp_path, limit)

    def seen(copies: Copies | None) -> list[torch.Tensor]:
        plain = ImageDataset(images, test_transform({"size": 32}), copies=copies)
        augmented = ImageDataset(images, training_transform({"size": 32}), copies=copies)
        found = [b.images for b in tolerant_loader(plain, 4, num_workers=workers)]
        batches = training_batches(augmented, 4, seed=3, epochs=3, num_workers=workers)
        return found + [batch.images for batch in batches]

    for wanted, found in zip(seen(None), seen(copies), strict=True):
        assert torch.equal(wanted, found)
    kept = sqlite3.connect(tmp_path / "copies.sqlite").execute("SELECT count(*) FROM copies")
    (count,) = kept.fetchone()
    if limit is None:
        assert count == len(images)
        assert copies.stopped is None
    else:  # worker processes say it to this one
        assert count < len(images)
        assert copies.stopped == f"its limit of {limit / 1e6:.3g} MB is reached"
        assert copies.text().endswith("the others are decoded in every epoch")


def test_a_changed_file_is_read_anew(photos: Path, tmp_path: Path) -> None:
    copies = Copies(tmp_path / "cache")
    path = save_jpeg(real_photo(0, (100, 80)), tmp_path / "a.jpg")
    before = copies.read(path, VIEW)
    moment = path.stat().st_mtime_ns
    save_jpeg(real_photo(1, (100, 80)), path)
    os.utime(path, ns=(moment, moment))  # the size has changed
    assert same(copies.read(path, VIEW), read_picture(path, VIEW))
    assert not same(copies.read(path, VIEW), before)
    os.utime(path, ns=(moment, moment + 1))
    assert same(copies.read(path, VIEW), read_picture(path, VIEW))
    (count,) = copies._database().execute("SELECT count(*) FROM copies").fetchone()
    assert count == 1
    path.unlink()
    with pytest.raises(UnreadableImageError, match="No such file"):
        copies.read(path, VIEW)


def test_copies_of_another_making_are_others(photos: Path, tmp_path: Path) -> None:
    path = readable(photos).paths[0]
    copies = Copies(tmp_path)
    for view in (VIEW, (64, 64), (30, 20), VIEW):
        assert same(copies.read(path, view), read_picture(path, view))
    (count,) = copies._database().execute("SELECT count(*) FROM copies").fetchone()
    assert count == 3


def test_names_of_any_bytes(tmp_path: Path) -> None:
    path = os.fsdecode(os.fsencode(tmp_path) + b"/\xff odd '\n.jpg")
    save_jpeg(real_photo(0, (100, 80)), Path(path))
    copies = Copies(tmp_path / "cache")
    first = copies.read(path, VIEW)
    assert same(copies.read(path, VIEW), first)


def test_files_of_any_time(tmp_path: Path) -> None:
    """A camera without a clock; a time in nanoseconds of more than 63 bits."""
    path = save_jpeg(real_photo(0, (100, 80)), tmp_path / "a.jpg")
    copies = Copies(tmp_path / "cache")
    for seconds in (-(10**9), 0, 10**10):
        os.utime(path, (seconds, seconds))
        for _ in range(2):
            assert same(copies.read(path, VIEW), read_picture(path, VIEW))
    assert copies.stopped is None


@pytest.mark.parametrize("name", [b"\xff", "é".encode() * 100, b"x" + "é".encode() * 100])
def test_a_reason_names_a_folder_of_any_name(photos: Path, tmp_path: Path, name: bytes) -> None:
    folder = tmp_path / os.fsdecode(name)
    folder.mkdir()
    (folder / "copies.sqlite").symlink_to(tmp_path / "other")
    copies = Copies(folder)
    assert all_right(copies, photos)
    assert copies.stopped is not None
    assert copies.stopped.startswith("it cannot be read (")
    copies.text().encode()


def test_unreadable_images_are_none(photos: Path, tmp_path: Path) -> None:
    copies = Copies(tmp_path)
    for _ in range(2):
        with pytest.raises(UnreadableImageError):
            copies.read(photos / "broken.jpg", VIEW)
    assert copies.stopped is None


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE copies SET pixels = zeroblob(length(pixels))",
        "UPDATE copies SET pixels = substr(pixels, 2)",
        "UPDATE copies SET pixels = 'text', crc = 3",
        "UPDATE copies SET rows = 'many'",
        "UPDATE copies SET rows = -rows, columns = -columns",
        "UPDATE copies SET width = 1",
        "UPDATE copies SET crc = NULL",
        "DELETE FROM copies",
    ],
)
def test_damaged_copies_are_made_again(photos: Path, tmp_path: Path, change: str) -> None:
    copies = Copies(tmp_path)
    assert all_right(copies, photos)
    copies._database().execute(change)
    assert all_right(copies, photos)
    assert copies.stopped is None
    whole = sqlite3.connect(tmp_path / "copies.sqlite")
    assert whole.execute("SELECT count(*) FROM copies WHERE pixels > 0").fetchone() == (6,)


@pytest.mark.parametrize("content", [b"", b"no database" * 1000, None, "cut", "table"])
def test_a_file_that_is_no_cache_changes_nothing(
    photos: Path, tmp_path: Path, content: bytes | str | None
) -> None:
    file = tmp_path / "copies.sqlite"
    if content == "cut":
        assert all_right(Copies(tmp_path), photos)
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    elif content == "table":
        sqlite3.connect(file, isolation_level=None).execute("CREATE TABLE copies (path TEXT)")
    elif content is None:
        file.mkdir()
    else:
        file.write_bytes(content)
    copies = Copies(tmp_path)
    assert all_right(copies, photos)
    if content == b"":
        assert copies.stopped is None
    else:
        assert copies.stopped is not None
        assert copies.stopped.startswith(("it cannot be read", "it cannot be written"))
        assert "small copies of" in copies.text()
    assert all_right(copies, photos)


_ENDLESS = """WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n)
    SELECT x || '' AS path, x || 'a' AS made, 3 * x AS bytes, 2 * x AS mtime_ns, 1 AS width,
    1 AS height, 1 AS columns, 1 AS rows, 1 AS crc, x'00' AS pixels FROM n"""


@pytest.mark.parametrize(
    "schema",
    [
        f"CREATE VIEW copies AS {_ENDLESS}",
        "CREATE TRIGGER t AFTER INSERT ON copies BEGIN DELETE FROM copies; END",
        "CREATE TABLE others (x)",
    ],
)
def test_a_file_that_computes_is_not_used(photos: Path, tmp_path: Path, schema: str) -> None:
    """It may come with a run folder from others; this view would never end."""
    if "VIEW" not in schema:
        assert all_right(Copies(tmp_path), photos)
    file = sqlite3.connect(tmp_path / "copies.sqlite", isolation_level=None)
    file.execute(schema)
    file.close()
    copies = Copies(tmp_path)
    assert all_right(copies, photos)
    assert copies.stopped == "it cannot be read (it holds something other than copies: remove it)"


def test_a_deleted_cache_changes_nothing(photos: Path, tmp_path: Path) -> None:
    copies = Copies(tmp_path / "cache")
    assert all_right(copies, photos)
    (tmp_path / "cache" / "copies.sqlite").unlink()
    assert all_right(copies, photos)
    copies.remove()
    assert not (tmp_path / "cache").exists()
    assert all_right(copies, photos)  # as predict() reads them after adapt()
    assert not (tmp_path / "cache").exists()


def test_other_files_in_its_folder_stay(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    copies = Copies(tmp_path)
    assert all_right(copies, photos)
    copies.remove()
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_gigabyte_stays_free(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = module.shutil.disk_usage
    copies = Copies(tmp_path)
    monkeypatch.setattr(
        module.shutil, "disk_usage", lambda path: usage(path)._replace(free=10**9 + 1000)
    )
    assert all_right(copies, photos)
    assert copies.stopped == "less than 1 GB is free on its disk"


def test_the_default_limit_is_half_of_what_is_free(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = 10**9 + 500_000
    usage = module.shutil.disk_usage
    monkeypatch.setattr(module.shutil, "disk_usage", lambda p: usage(p)._replace(free=free))
    assert Copies(tmp_path)._most == free // 2


def forked(work: Callable[[], object]) -> multiprocessing.Process:
    """A process that works as a loader's does: on one thread."""

    def run() -> None:
        torch.set_num_threads(1)
        work()

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    return process


@pytest.mark.skipif(not hasattr(resource, "RLIMIT_FSIZE"), reason="no such limit")
def test_a_disk_that_takes_no_more(photos: Path, tmp_path: Path) -> None:
    """The system refuses to write, at a place that this test does not choose."""
    copies = Copies(tmp_path)

    def work() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        assert all_right(copies, photos)

    process = forked(work)
    process.join()
    assert process.exitcode == 0
    assert copies.stopped is not None
    assert copies.stopped.startswith(("it cannot be written", "its limit"))
    assert all_right(Copies(tmp_path), photos)
    whole = sqlite3.connect(tmp_path / "copies.sqlite")
    assert whole.execute("PRAGMA integrity_check").fetchone() == ("ok",)


def test_two_writers_that_are_killed(photos: Path, tmp_path: Path) -> None:
    """They write at the same time, and end in the middle of it."""
    paths = readable(photos).paths

    def work() -> None:
        copies = Copies(tmp_path)
        for side in range(20, 10**6):
            for path in paths:
                copies.read(path, (1 + side % 200, 1 + side % 199))

    for _ in range(2):
        writers = [forked(work) for _ in range(2)]
        time.sleep(1)
        for writer in writers:
            writer.kill()
            writer.join()
            assert writer.exitcode == -signal.SIGKILL
        assert all_right(Copies(tmp_path), photos)
        whole = sqlite3.connect(tmp_path / "copies.sqlite")
        assert whole.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        (count,) = whole.execute("SELECT count(*) FROM copies").fetchone()
        assert count > 6
        whole.close()


def test_it_can_be_sent_to_a_process(photos: Path, tmp_path: Path) -> None:
    copies = Copies(tmp_path)
    assert all_right(copies, photos)
    other = pickle.loads(pickle.dumps(copies))
    assert all_right(other, photos)


def test_pictures_in_memory_can_be_sent_to_processes(photos: Path) -> None:
    """More of them than a process may have files open; and views are the same bits there."""
    images = [real_photo(i % 2, (60, 50)) for i in range(80)]
    dataset = PictureDataset(images, test_transform({"size": 24}))
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 64
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (used + 40, before[1]))
        received = ForkingPickler.loads(ForkingPickler.dumps(dataset))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    for index in range(len(images)):
        assert torch.equal(received[index], dataset[index])


def test_which_folder_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    auto = open_copies("auto", tmp_path / "own", "auto")
    assert auto is not None
    assert auto.folder == tmp_path / "own"
    given = open_copies("mine", tmp_path / "own", "auto", 10)
    assert given is not None
    assert given.folder == tmp_path / "mine"
    assert open_copies("off", tmp_path, "auto") is None
    assert open_copies("auto", tmp_path, "full") is None
    with pytest.raises(ValueError, match=r"cache='mine' keeps small copies .* decode='full'"):
        open_copies("mine", tmp_path, "full")
    with pytest.raises(ValueError, match="cache is empty: it is 'auto', 'off', or a folder"):
        open_copies("", tmp_path, "auto")
    with temporary_copies("auto", "auto") as copies:
        assert copies is not None
        folder = copies.folder
        assert folder.is_dir()
    assert not folder.exists()
    with temporary_copies("mine", "auto") as copies:
        assert copies is not None
    assert (tmp_path / "mine").is_dir()


@pytest.mark.parametrize("cache", [None, False, 3, b"x"])
def test_a_cache_of_another_type_is_refused(tmp_path: Path, cache: object) -> None:
    with pytest.raises(TypeError, match="cache must be 'auto', 'off', or a folder, got "):
        open_copies(cache, tmp_path, "auto")  # type: ignore[arg-type]


def test_without_a_place_to_write_images_are_decoded_each_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "missing"))
    with (
        pytest.warns(UserWarning, match="their copies have no place: .* Set TMPDIR"),
        temporary_copies("auto", "auto") as copies,
    ):
        assert copies is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for cache, decode in (("off", "auto"), ("auto", "full")):
            with temporary_copies(cache, decode) as copies:  # type: ignore[arg-type]
                assert copies is None


def test_without_sqlite_images_are_decoded_each_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "sqlite3", None)
    with pytest.warns(UserWarning, match=r"this Python has no sqlite3 .*--cache off"):
        assert open_copies("auto", tmp_path, "auto") is None


def test_a_link_is_not_followed(photos: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.sqlite"
    sqlite3.connect(other, isolation_level=None).execute("CREATE TABLE mine (x)")
    content = other.read_bytes()
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "copies.sqlite").symlink_to(other)
    copies = Copies(tmp_path / "cache")
    assert all_right(copies, photos)
    assert copies.stopped is not None
    assert "is a link to another file: remove it" in copies.text()
    copies.remove()
    assert other.read_bytes() == content


@pytest.mark.parametrize("cache", ["auto", "mine"])
def test_a_reached_limit_is_warned_of(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: str
) -> None:
    """Where nobody prints it, as in adapt()."""
    monkeypatch.chdir(tmp_path)
    usage = module.shutil.disk_usage
    monkeypatch.setattr(module.shutil, "disk_usage", lambda p: usage(p)._replace(free=10**9))
    with warnings.catch_warnings(record=True) as said, temporary_copies(cache, "auto") as copies:
        warnings.simplefilter("always")
        assert copies is not None
        assert all_right(copies, photos)
    texts = [str(warning.message) for warning in said]
    assert any("takes no more: less than 1 GB is free on its disk" in text for text in texts)
