"""Lists of images: folders, list files, CSV; odd names and every refusal."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from PIL import Image

from ueo_fast.finetune.data import image_list
from ueo_fast.finetune.data.decode import readable_extensions
from ueo_fast.finetune.data.image_list import (
    ImageList,
    check_root,
    image_extensions,
    printable,
    read_images,
)


def touch(root: Path, *names: str) -> Path:
    """Files that exist; only their names matter here."""
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    return root


def test_class_folders_give_labels_in_the_order_of_the_paths(tmp_path: Path) -> None:
    touch(tmp_path, "zebra/2.jpg", "zebra/10.JPG", "ant/deep/er/x.png", "ant/a.webp")
    (tmp_path / "empty class").mkdir()
    images = read_images(tmp_path)
    assert images.names == ("ant/a.webp", "ant/deep/er/x.png", "zebra/10.JPG", "zebra/2.jpg")
    assert images.labels == ("ant", "ant", "zebra", "zebra")
    assert [Path(path) for path in images.paths] == [tmp_path / name for name in images.names]
    assert read_images(str(tmp_path)) == images


def test_a_flat_folder_has_no_labels(tmp_path: Path) -> None:
    images = read_images(touch(tmp_path, "b.png", "a.jpeg"))
    assert images.names == ("a.jpeg", "b.png")
    assert images.labels is None


def test_what_is_no_image_is_counted(tmp_path: Path) -> None:
    touch(tmp_path, "c/.DS_Store", "c/._x.jpg", ".hidden/x.jpg", "c/notes.txt", "c/f.h5", "c/x.jpg")
    touch(tmp_path, "c/no_extension", "c/paper.pdf", "c/film.mpg", "c/b.TXT", "c/raw.CR2")
    os.mkfifo(tmp_path / "pipe.jpg")
    images = read_images(tmp_path)
    assert images.names == ("c/raw.CR2", "c/x.jpg")
    assert dict(images.left_out) == {
        **{"hidden": 2, "in .hidden/": 1, ".txt": 2, ".h5": 1, ".pdf": 1, ".mpg": 1},
        **{"without extension": 1, "pipe, socket or device": 1},
    }
    (text,) = images.remarks()
    assert text.startswith("files in the folder that are not read: 2 x .txt, 2 x hidden, 1 x .h5")


def test_remarks_stay_short(tmp_path: Path) -> None:
    images = read_images(touch(tmp_path, "x.jpg", *(f"data.\x1b{i:03}" for i in range(200))))
    (text,) = images.remarks()
    assert text.endswith("1 x .\\x1b007 and 192 more")
    assert len(images.left_out) == 200


def test_thumbnails_of_network_storage_are_left_out(tmp_path: Path) -> None:
    touch(tmp_path, "cat/1.jpg", "cat/@eaDir/1.jpg/SYNOPHOTO_THUMB_M.jpg", "#recycle/cat/2.jpg")
    touch(tmp_path, "cat/@eaDir/1.jpg/SYNOPHOTO_THUMB_XL.jpg", ".thumbnails/1.png")
    touch(tmp_path, "dog/.@__thumb/s100.jpg", "dog/3.jpg", "@Recycle/4.jpg")
    images = read_images(tmp_path)
    assert (images.names, images.labels) == (("cat/1.jpg", "dog/3.jpg"), ("cat", "dog"))
    assert dict(images.left_out) == {
        **{"in @eaDir/": 2, "in #recycle/": 1, "in .thumbnails/": 1, "in .@__thumb/": 1},
        "in @Recycle/": 1,
    }


def test_odd_names_survive(tmp_path: Path) -> None:
    names = (
        "Größe ☃/図 1.png",
        "Größe ☃/a, b.jpg",
        'Größe ☃/it\'s "it".jpg',
        "Größe ☃/new\nline.jpg",
    )
    images = read_images(touch(tmp_path, *names))
    assert set(images.names) == set(names)
    assert all(os.path.isfile(path) for path in images.paths)


@pytest.mark.skipif(os.name != "posix", reason="only there names are bytes")
def test_a_name_that_is_not_unicode_can_be_opened_and_shown(tmp_path: Path) -> None:
    path = os.path.join(os.fsencode(tmp_path), b"caf\xe9.jpg")
    try:
        with open(path, "wb"):
            pass
    except OSError:  # macOS refuses such names
        pytest.skip("the file system takes Unicode names only")
    images = read_images(tmp_path)
    assert images.names == ("caf\\xe9.jpg",)
    assert os.path.isfile(images.paths[0])
    images.names[0].encode("utf-8")
    listed = tmp_path / "list.txt"
    listed.write_bytes(b"caf\xe9.jpg 3\n")
    assert read_images(listed) == ImageList(images.paths, images.names, ("3",))


OUTSIDE = "link that leads out of the folder (--follow-links follows it)"
TWICE = "second path to what is read already (link)"


def test_links_out_of_the_folder_are_followed_when_asked(tmp_path: Path) -> None:
    outside = touch(tmp_path / "outside", "deep/1.jpg", "2.jpg", "3.jpg")
    data = touch(tmp_path / "data", "own.jpg")
    (data / "cat").symlink_to(outside)
    (data / "dog").symlink_to(outside / "deep")
    (data / "one.jpg").symlink_to(outside / "2.jpg")
    (outside / "deep" / "up").symlink_to(outside)
    (data / "loop").symlink_to(data)
    (data / "all").symlink_to(tmp_path)
    (data / "sibling").symlink_to(f"{tmp_path}/data2")
    touch(tmp_path / "data2", "4.jpg")  # begins as the folder does, and is another
    images = read_images(data)
    assert (images.names, images.labels) == (("own.jpg",), None)
    assert dict(images.left_out) == {OUTSIDE: 5, TWICE: 1}
    assert images.followed == ()
    followed = read_images(data, follow_links=True)
    assert len(followed) == len({os.path.realpath(path) for path in followed.paths}) == 5
    assert followed.followed[0] == f"all -> {tmp_path}"
    assert followed.remarks()[1].startswith(f"links that were followed: all -> {tmp_path}")
    assert read_images(data, follow_links=True) == followed
    # The folder that the user names may be a link.
    (tmp_path / "link").symlink_to(data)
    assert read_images(tmp_path / "link").names == ("own.jpg",)


def test_no_file_is_read_twice(tmp_path: Path) -> None:
    touch(tmp_path, "b/x.jpg", ".store/y.jpg")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "first.jpg").symlink_to(tmp_path / "b" / "x.jpg")
    (tmp_path / "again").symlink_to("b")
    (tmp_path / "a" / "y.jpg").symlink_to("../.store/y.jpg")  # within the folder: followed
    (tmp_path / "c.jpg").symlink_to("a/y.jpg")
    os.link(tmp_path / "b" / "x.jpg", tmp_path / "b" / "z.jpg")
    images = read_images(tmp_path)
    assert images.names == ("a/y.jpg", "b/x.jpg")
    assert dict(images.left_out) == {TWICE: 4, "in .store/": 1}
    assert images.followed == (f"a/y.jpg -> {tmp_path}/.store/y.jpg",)


def test_a_file_system_without_inodes_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    touch(tmp_path, "a.jpg", "b.jpg", "c/d.jpg")

    class Entry:
        def __init__(self, entry: os.DirEntry[str]) -> None:
            self._entry = entry

        def inode(self) -> int:
            return 0

        def __getattr__(self, name: str) -> object:
            return getattr(self._entry, name)

    entries = image_list._entries
    monkeypatch.setattr(image_list, "_entries", lambda path: [Entry(e) for e in entries(path)])
    assert len(read_images(tmp_path)) == 3


def test_a_dead_link_is_listed_and_a_pipe_is_not(tmp_path: Path) -> None:
    (tmp_path / "gone.jpg").symlink_to(tmp_path / "nowhere")
    (tmp_path / "itself.jpg").symlink_to("itself.jpg")
    (tmp_path / "circle").symlink_to("circle")
    os.mkfifo(tmp_path / "pipe.jpg")
    assert read_images(tmp_path).names == ("gone.jpg", "itself.jpg")


def test_a_folder_without_images_is_refused(tmp_path: Path) -> None:
    touch(tmp_path, "a.txt", "b.txt", "c.pdf", "d")
    with pytest.raises(FileNotFoundError, match=r"has no image.*\.jpg.*2 x \.txt") as raised:
        read_images(tmp_path)
    assert str(tmp_path) in str(raised.value)
    assert "1 x without extension" in str(raised.value)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="no file at all"):
        read_images(tmp_path / "empty")


def test_a_folder_that_may_not_be_read_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As root (in a container) permissions would not stop us.
    touch(tmp_path, "a/1.jpg", "b/2.jpg")
    scandir = os.scandir

    def refuse(path: Path) -> object:
        if Path(path).name == "b":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(PermissionError, match="b"):
        read_images(tmp_path)


def test_a_single_image_is_a_list_of_one(tmp_path: Path) -> None:
    images = read_images(touch(tmp_path, "my photo.jpg") / "my photo.jpg")
    assert images == ImageList((str(tmp_path / "my photo.jpg"),), ("my photo.jpg",))


def test_what_pillow_opens_is_an_image() -> None:
    assert {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif"} <= readable_extensions()
    for extension in readable_extensions():
        # An MPO is opened as a JPEG.
        assert Image.registered_extensions()[extension] in {*Image.OPEN, "MPO"}
    # Images that cannot be read are listed too, so that nobody misses them.
    assert {".heic", ".cr2", ".nef", ".arw", ".dng", ".svg", ".eps", ".bpg"} <= image_extensions()
    assert not {".txt", ".pdf", ".mpg", ".mov", ".h5", ".csv"} & image_extensions()


def write(path: Path, text: str, encoding: str = "utf-8") -> Path:
    path.write_bytes(text.encode(encoding))
    return path


def test_a_list_as_the_authors_have_it(tmp_path: Path) -> None:
    touch(tmp_path, "amazon/a.jpg", "amazon/my b.jpg", "x")
    listed = write(tmp_path / "list.txt", "amazon/a.jpg 3\n\namazon/my b.jpg 12\nx 0")
    images = read_images(listed)
    assert images.names == ("amazon/a.jpg", "amazon/my b.jpg", "x")
    assert images.labels == ("3", "12", "0")
    assert images.paths == tuple(str(tmp_path / name) for name in images.names)


def test_paths_start_at_root_or_at_the_list(tmp_path: Path) -> None:
    data = touch(tmp_path / "data", "a.jpg")
    lists = tmp_path / "lists"
    lists.mkdir()
    listed = write(lists / "l.txt", "a.jpg 1\n")
    assert read_images(listed, root=data).paths == (str(data / "a.jpg"),)
    with pytest.raises(FileNotFoundError, match=rf"1 \({lists}/a.jpg\) of 1 file does not exist"):
        read_images(listed)
    write(listed, f"{data}/a.jpg 1\n")
    assert read_images(listed).paths == (str(data / "a.jpg"),)


def test_labels_may_be_names_or_left_out(tmp_path: Path) -> None:
    touch(tmp_path, "a b.jpg", "c.jpg", "1.jpg")
    assert read_images(write(tmp_path / "l", "a b.jpg cat\nc.jpg 7\n")).labels == ("cat", "7")
    assert read_images(write(tmp_path / "l", "a b.jpg\tcat\r\nc.jpg\t☃\r\n")).labels == ("cat", "☃")
    bare = read_images(write(tmp_path / "l", "\ufeffa b.jpg\r\nc.jpg\r\n1.jpg"))
    assert bare.labels is None
    assert bare.names == ("a b.jpg", "c.jpg", "1.jpg")
    assert read_images(write(tmp_path / "l", "c.jpg -1\n1.jpg +2\n")).labels == ("-1", "+2")
    tabs = read_images(write(tmp_path / "l", "a b.jpg\talarm clock\nc.jpg \t cat\n"))
    assert (tabs.names, tabs.labels) == (("a b.jpg", "c.jpg"), ("alarm clock", "cat"))


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("a.jpg 1\na.jpg\n", ValueError, "line 2: 'a.jpg' has no label, unlike the lines before"),
        ("a.jpg\n\na.jpg cat\n", ValueError, "line 3: 'a.jpg cat' has a label, unlike"),
        ("\n \n", ValueError, "lists no image; write one path per line"),
        ("a.jpg 1\nb.jpg 1\nc.jpg 1\n", FileNotFoundError, r"2 \(.*b.jpg, .*c.jpg\) of 3 files"),
        ("a.jpg alarm clock\n", FileNotFoundError, "a label is one word, write alarm_clock"),
        ("a.jpg 1\0", ValueError, "is not UTF-8 text"),
    ],
)
def test_lists_are_checked(tmp_path: Path, text: str, error: type, message: str) -> None:
    touch(tmp_path, "a.jpg")
    with pytest.raises(error, match=message):
        read_images(write(tmp_path / "l.txt", text))


def test_a_csv(tmp_path: Path) -> None:
    touch(tmp_path, "a.jpg", "b, c.jpg", "d.jpg")
    text = '\ufeffImage,note,Class\r\na.jpg,x,alarm clock\r\n"b, c.jpg",,\r\n\r\nd.jpg,y,cat\r\n'
    images = read_images(write(tmp_path / "l.CSV", text))
    assert images.names == ("a.jpg", "b, c.jpg", "d.jpg")
    assert images.labels == ("alarm clock", None, "cat")
    assert images.paths == tuple(str(tmp_path / name) for name in images.names)
    numbers = read_images(write(tmp_path / "l.csv", "path,label\na.jpg,4\nd.jpg,\n"))
    assert numbers.labels == ("4", None)
    assert read_images(write(tmp_path / "l.csv", "path\na.jpg\n")).labels is None
    assert read_images(write(tmp_path / "l.csv", "path,label\na.jpg,\n")).labels is None


@pytest.mark.parametrize("separator", [";", "\t"])
def test_a_csv_as_spreadsheets_write_it(tmp_path: Path, separator: str) -> None:
    touch(tmp_path, "a, b.jpg")
    text = f"path{separator}label\na, b.jpg{separator}alarm clock\n"
    images = read_images(write(tmp_path / "l.csv", text))
    assert (images.names, images.labels) == (("a, b.jpg",), ("alarm clock",))


def test_a_csv_of_ours_can_be_read_back(tmp_path: Path) -> None:
    touch(tmp_path, "a.jpg")
    text = f"image,path,label\nshown name,{tmp_path}/a.jpg,cat\n"
    images = read_images(write(tmp_path / "predictions.csv", text))
    assert images == ImageList((f"{tmp_path}/a.jpg",), ("shown name",), ("cat",))


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("", ValueError, "no column 'path' or 'image'; .* is empty"),
        ("a.jpg,1\n", ValueError, "no column 'path' or 'image'; .*'a.jpg', '1'"),
        ("path,label\na.jpg,1,2\n", ValueError, "line 2: 2 cells and a path are needed"),
        ("path,label\na.jpg,1\na.jpg\n", ValueError, "line 3: 2 cells"),
        ("path,label\n,1\n", ValueError, "line 2: 2 cells and a path"),
        ('path,label\n"a.jpg,1\n', ValueError, "line 2: unexpected end of data"),
        ("path,label\n", ValueError, "lists no image"),
        ("path,label\nz.jpg,1\n", FileNotFoundError, r"1 \(.*z.jpg\) of 1 file does not exist"),
    ],
)
def test_csvs_are_checked(tmp_path: Path, text: str, error: type, message: str) -> None:
    touch(tmp_path, "a.jpg")
    with pytest.raises(error, match=message):
        read_images(write(tmp_path / "l.csv", text))


def test_sources_are_checked(tmp_path: Path) -> None:
    touch(tmp_path, "a.jpg")
    with pytest.raises(FileNotFoundError, match="nowhere does not exist; give a folder of images"):
        read_images(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"b.jpg does not exist"):
        read_images(tmp_path / "b.jpg")
    with pytest.raises(ValueError, match=r"data_root=.* and .*a.jpg; leave it out"):
        check_root(tmp_path, tmp_path, None, tmp_path / "a.jpg")
    check_root(tmp_path, tmp_path, tmp_path / "l.csv")
    assert read_images(tmp_path, root="lists").names == ("a.jpg",)  # which needs none
    with pytest.raises(FileNotFoundError, match=r"root='.*nowhere' is not a folder"):
        read_images(write(tmp_path / "l.txt", "a.jpg 1\n"), root=tmp_path / "nowhere")


def test_subset_keeps_fields_together() -> None:
    images = ImageList(("/a", "/b", "/c"), ("a", "b", "c"), ("x", None, "z"))
    assert images.subset([2, 0]) == ImageList(("/c", "/a"), ("c", "a"), ("z", "x"))
    assert images.subset(torch.tensor([1])) == ImageList(("/b",), ("b",), (None,))
    assert ImageList(("/a", "/b"), ("a", "b")).subset([1]).labels is None
    with pytest.raises(ValueError, match="labels has 1 entries, but there are 3 paths"):
        ImageList(("/a", "/b", "/c"), ("a", "b", "c"), ("x",))


def test_printable_leaves_unicode_alone() -> None:
    assert printable("Größe ☃/図.png") == "Größe ☃/図.png"
