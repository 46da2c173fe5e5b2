"""Decoding: every kind of image becomes 8-bit RGB, or an error that names the file."""

from __future__ import annotations

import io
import os
import pickle
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, features

from ueo_fast.finetune.data import decode
from ueo_fast.finetune.data.decode import UnreadableImageError, formats, open_rgb
from ueo_fast.finetune.data.image_list import read_images
from ueo_fast.finetune.data.views import ImageDataset


def decoded(path: Path) -> np.ndarray:
    image = open_rgb(path)
    assert image.mode == "RGB"
    pixels = np.asarray(image)
    assert pixels.dtype == np.uint8
    return pixels


def save(image: Image.Image, path: Path, **options: object) -> Path:
    image.save(path, **options)
    return path


GRADIENT = np.arange(256, dtype=np.uint8).reshape(16, 16)


def test_rgb_is_left_as_it_is(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    np.testing.assert_array_equal(
        decoded(save(Image.fromarray(pixels), tmp_path / "a.png")), pixels
    )


def test_grey_and_bilevel(tmp_path: Path) -> None:
    found = decoded(save(Image.fromarray(GRADIENT), tmp_path / "a.png"))
    np.testing.assert_array_equal(found, GRADIENT[..., None].repeat(3, axis=2))
    white = decoded(save(Image.new("1", (4, 3), 1), tmp_path / "b.png"))
    assert (white == 255).all()


def grey16_png(levels: np.ndarray) -> bytes:
    """A 16-bit greyscale PNG, written by hand: it must not depend on how Pillow writes one."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    height, width = levels.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in levels)
    header = struct.pack(">IIBBBBB", width, height, 16, 0, 0, 0, 0)
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


def test_16_bit_png_is_scaled_not_clipped(tmp_path: Path) -> None:
    levels = GRADIENT.astype(np.uint16) * 257
    (tmp_path / "a.png").write_bytes(grey16_png(levels))
    np.testing.assert_array_equal(decoded(tmp_path / "a.png")[..., 1], GRADIENT)
    (tmp_path / "b.png").write_bytes(grey16_png(np.full((2, 2), 300, np.uint16)))
    assert (decoded(tmp_path / "b.png") == 1).all()  # 300 / 257


@pytest.mark.parametrize(
    ("levels", "expected"),
    [
        (GRADIENT.astype(np.int32) * 257, GRADIENT),  # 16 bits in 32
        (GRADIENT.astype(np.int32) * 2**20 - 7, GRADIENT),  # its own range
        (np.full((4, 4), -3, np.int32), np.zeros((4, 4))),
        (GRADIENT.astype(np.float32) / 255, GRADIENT),
        (GRADIENT.astype(np.float32), GRADIENT),
        (GRADIENT.astype(np.float32) * 1000 - 9, GRADIENT),
        ((GRADIENT.astype(np.float32) / 255 * 2 - 1) * 3e38, GRADIENT),  # its range overflows
        (np.full((4, 4), 2e9, np.float32), np.zeros((4, 4))),
    ],
)
def test_32_bit_tiff(tmp_path: Path, levels: np.ndarray, expected: np.ndarray) -> None:
    found = decoded(save(Image.fromarray(levels), tmp_path / "a.tif"))
    np.testing.assert_array_equal(found[..., 0], expected)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_floats_must_be_finite(tmp_path: Path, value: float) -> None:
    levels = np.ones((4, 4), np.float32)
    levels[1, 2] = value
    path = save(Image.fromarray(levels), tmp_path / "a.tif")
    with pytest.raises(UnreadableImageError, match="infinite or not a number"):
        open_rgb(path)


def test_cmyk_as_pillow_does(tmp_path: Path) -> None:
    colours = Image.merge("CMYK", [Image.new("L", (16, 16), level) for level in (0, 255, 255, 0)])
    red = decoded(save(colours, tmp_path / "a.jpg", quality=95))  # written inverted, as Adobe does
    assert b"Adobe" in (tmp_path / "a.jpg").read_bytes()
    assert (red[..., 0] > 230).all()
    assert (red[..., 1:] < 25).all()
    np.testing.assert_array_equal(decoded(save(colours, tmp_path / "a.tif"))[0, 0], [255, 0, 0])


def test_transparency_lies_on_white(tmp_path: Path) -> None:
    half = Image.new("RGBA", (2, 2), (255, 0, 0, 0))
    half.putpixel((1, 1), (0, 0, 255, 255))
    half.putpixel((0, 1), (0, 0, 0, 128))
    found = decoded(save(half, tmp_path / "a.png"))
    np.testing.assert_array_equal(found[0, 0], [255, 255, 255])
    np.testing.assert_array_equal(found[1, 1], [0, 0, 255])
    np.testing.assert_array_equal(found[1, 0], [127, 127, 127])
    grey = decoded(save(Image.new("LA", (2, 2), (10, 0)), tmp_path / "b.png"))
    assert (grey == 255).all()
    keyed = save(Image.new("RGB", (2, 2), (1, 2, 3)), tmp_path / "c.png", transparency=(1, 2, 3))
    assert (decoded(keyed) == 255).all()


def test_palettes(tmp_path: Path) -> None:
    image = Image.new("P", (2, 2), 1)
    image.putpalette([255, 0, 0, 0, 255, 0])
    np.testing.assert_array_equal(decoded(save(image, tmp_path / "a.png"))[0, 0], [0, 255, 0])
    clear = decoded(save(image, tmp_path / "b.png", transparency=1))
    assert (clear == 255).all()


def test_an_animation_is_its_first_frame(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "lime", "blue")]
    for name in ("a.gif", "a.webp", "a.png"):
        path = save(
            frames[0], tmp_path / name, save_all=True, append_images=frames[1:], lossless=True
        )
        np.testing.assert_array_equal(decoded(path)[0, 0], [255, 0, 0])


def test_the_cameras_orientation_is_applied(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned to the right
    path = save(Image.fromarray(GRADIENT[:, :8]), tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(decoded(path)[..., 0], np.rot90(GRADIENT[:, :8], -1))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_broken_exif_is_no_reason_to_refuse_the_pixels(tmp_path: Path) -> None:
    path = save(Image.fromarray(GRADIENT), tmp_path / "a.png", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff")
    np.testing.assert_array_equal(decoded(path)[..., 0], GRADIENT)


def jpeg() -> bytes:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "JPEG")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "the file is empty"),
        (b"hello, I am a text", r"no image in a format that is read here \(JPEG, "),
        (jpeg()[:1500], "truncated"),
        (grey16_png(GRADIENT.astype(np.uint16))[:60], "."),
        (grey16_png(GRADIENT.astype(np.uint16)).replace(b"IDAT", b"XDAT"), "."),
    ],
)
def test_broken_files_are_named(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "Größe.jpg"
    path.write_bytes(content)
    with pytest.raises(UnreadableImageError, match=reason) as raised:
        open_rgb(path)
    assert raised.value.path == str(path)
    assert str(raised.value) == f"{path}: {raised.value.reason}"


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_flipped_bytes_give_an_image_or_the_error(tmp_path: Path) -> None:
    """Pillow's decoders raise all sorts of things on hostile bytes; ours is the only one."""
    rng = np.random.default_rng(1)
    path = tmp_path / "a"
    sources = [jpeg(), grey16_png(GRADIENT.astype(np.uint16))]
    for suffix in ("GIF", "TIFF", "BMP", "WEBP", "PPM"):
        buffer = io.BytesIO()
        Image.fromarray(GRADIENT).save(buffer, suffix)
        sources.append(buffer.getvalue())
    outcomes = set()
    for source in sources:
        for _ in range(40):
            content = bytearray(source)
            for position in rng.integers(0, min(len(content), 400), 3):
                content[position] = rng.integers(0, 256)
            path.write_bytes(content)
            try:
                assert open_rgb(path).mode == "RGB"
                outcomes.add("image")
            except UnreadableImageError:
                outcomes.add("error")
    assert outcomes == {"image", "error"}


def test_missing_files_and_folders(tmp_path: Path) -> None:
    with pytest.raises(UnreadableImageError, match="No such file or directory"):
        open_rgb(tmp_path / "gone.jpg")
    with pytest.raises(UnreadableImageError, match="Is a directory"):
        open_rgb(tmp_path)


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    with pytest.raises(
        UnreadableImageError, match=r"not a regular file \(a pipe, socket or device\)"
    ):
        open_rgb(tmp_path / "pipe.jpg")


def test_bombs_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(Image.new("L", (50, 50)), tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(UnreadableImageError, match="exceeds limit"):
        open_rgb(path)
    monkeypatch.undo()
    path = save(Image.new("L", (1, 1001)), tmp_path / "b.png")
    with pytest.raises(UnreadableImageError, match="sides of 1 x 1001 pixels, more than 1000 to 1"):
        open_rgb(path)


@pytest.mark.parametrize(
    ("levels", "dtype", "mib"),
    [(5, np.uint16, "6"), (1000, np.float32, "8"), (5, np.uint8, "5")],
)
def test_pixels_times_depth_are_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, levels: float, dtype: type, mib: str
) -> None:
    """What Pillow keeps of a grey image, and 4 bytes of RGB."""
    pixels = np.full((1024, 1024), levels, dtype)
    path = save(Image.fromarray(pixels), tmp_path / "a.tif")
    monkeypatch.setattr(decode, "MOST_BYTES", int(mib) * 2**20)
    open_rgb(path)
    monkeypatch.setattr(decode, "MOST_BYTES", int(mib) * 2**20 - 1)
    with pytest.raises(
        UnreadableImageError, match=r"more than the limit of .* MiB; make it"
    ) as one:
        open_rgb(path)
    assert f"1024 x 1024 pixels (TIFF, mode {Image.fromarray(pixels).mode}) take {mib} MiB" in str(
        one.value
    )


def test_a_tile_may_not_be_larger_than_the_image(tmp_path: Path) -> None:
    path = save(Image.new("RGB", (16, 16)), tmp_path / "a.tif", compression="tiff_lzw")
    with Image.open(path) as image:
        image.tag_v2[322] = image.tag_v2[323] = 2**15
        with pytest.raises(ValueError, match="take 3072 MiB to decode"):
            decode._check_memory(image)


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is in other units elsewhere")
def test_converting_takes_no_more_memory_than_said(tmp_path: Path) -> None:
    size = (5000, 6000)
    save(Image.fromarray(np.full(size, 300, np.uint16)), tmp_path / "2.png")
    save(Image.fromarray(np.full(size, 3e5, np.float32)), tmp_path / "4.tif")
    save(Image.new("RGBA", size, (9, 9, 9, 9)), tmp_path / "4.png")
    code = """
import resource, sys
from ueo_fast.finetune.data.decode import formats, open_rgb
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
formats()
before = peak()
for path in sys.argv[1:]:
    open_rgb(path)
    print(peak() - before)
"""
    paths = [str(tmp_path / name) for name in ("2.png", "4.tif", "4.png")]
    done = subprocess.run(
        [sys.executable, "-c", code, *paths], check=True, capture_output=True, text=True
    )
    for line, kept in zip(done.stdout.split(), (2, 4, 4), strict=True):
        assert float(line) < 30e6 * (kept + 4) / 2**20 + 40


def test_large_images_are_converted_as_small_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    images = {
        "I;16": Image.fromarray(rng.integers(0, 65536, (37, 29), dtype=np.uint16)),
        "I": Image.fromarray(rng.integers(-(2**31), 2**31, (37, 29)).astype(np.int32)),
        "F": Image.fromarray(rng.normal(size=(37, 29)).astype(np.float32)),
        "RGBA": Image.fromarray(rng.integers(0, 256, (37, 29, 4), dtype=np.uint8)),
        "CMYK": Image.fromarray(rng.integers(0, 256, (37, 29, 4), dtype=np.uint8), "CMYK"),
        "P": Image.fromarray(rng.integers(0, 256, (37, 29, 3), dtype=np.uint8)).quantize(40),
        "1": Image.fromarray(rng.integers(0, 2, (37, 29)).astype(bool)),
    }
    for mode, image in images.items():
        assert image.mode == mode
        path = save(image, tmp_path / "a.tif")
        whole = decoded(path)
        monkeypatch.setattr(decode, "_BAND", 100)
        np.testing.assert_array_equal(decoded(path), whole, err_msg=mode)
        monkeypatch.undo()


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n"


@pytest.mark.parametrize("name", ["a.jpg", "a.eps"])
def test_no_other_program_is_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    for call in ("Popen", "run", "call", "check_call", "check_output"):
        monkeypatch.setattr(subprocess, call, lambda *_, **__: pytest.fail("started a program"))
    (tmp_path / name).write_bytes(EPS)
    with Image.open(tmp_path / name) as image:
        assert image.format == "EPS"  # so Pillow would ask Ghostscript
    with pytest.raises(UnreadableImageError, match=r"no image in a format|a kind of image that is"):
        open_rgb(tmp_path / name)


def test_formats_are_a_closed_list() -> None:
    assert not {"EPS", "WMF", "FITS", "ICO", "ICNS", "HDF5"} & set(formats())
    assert {"JPEG", "PNG", "TIFF", "WEBP", "GIF", "BMP", "PPM"} <= set(formats())


def test_the_pictures_of_a_3d_camera_are_read(tmp_path: Path) -> None:
    """Pillow has a format for their extension, but opens them as JPEG."""
    first, second = Image.new("RGB", (16, 12), (200, 30, 10)), Image.new("RGB", (16, 12))
    path = tmp_path / "a.MPO"
    first.save(path, format="MPO", save_all=True, append_images=[second])
    assert np.abs(decoded(path).astype(int) - (200, 30, 10)).max() <= 2
    assert ".mpo" in decode.readable_extensions()


def test_heic_is_read_where_pillow_heif_is(tmp_path: Path) -> None:
    pytest.importorskip("pillow_heif")
    formats()
    exif = Image.Exif()
    exif[0x0112] = 6  # as a telephone writes it
    image = Image.new("RGB", (64, 48), (200, 30, 10))
    turned = save(image, tmp_path / "turned.heic", format="HEIF", exif=exif.tobytes())
    assert b"irot" in turned.read_bytes()  # so it is turned by its container, and once
    assert decoded(turned).shape == (64, 48, 3)
    path = save(image, tmp_path / "a.HEIC", format="HEIF")
    assert np.abs(decoded(path).astype(int) - (200, 30, 10)).max() <= 2
    path.rename(tmp_path / "b.jpg")
    assert decoded(tmp_path / "b.jpg").shape == (48, 64, 3)
    (tmp_path / "c.heic").write_bytes(b"\0\0\0\x18ftypheic")
    with pytest.raises(UnreadableImageError, match="damaged, or no image in a format"):
        open_rgb(tmp_path / "c.heic")


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow was built without AVIF")
def test_avif_is_read_whatever_its_name(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    image = Image.new("RGB", (64, 48), (200, 30, 10))
    path = save(image, tmp_path / "a.avif", format="AVIF", exif=exif)
    assert decoded(path).shape == (64, 48, 3)
    assert np.abs(decoded(path).astype(int) - (200, 30, 10)).max() <= 3
    path.rename(tmp_path / "b.jpg")
    assert decoded(tmp_path / "b.jpg").shape == (64, 48, 3)
    (tmp_path / "c.avif").write_bytes(b"\0\0\0\x18ftypavif")
    with pytest.raises(UnreadableImageError, match="damaged, or no image in a format"):
        open_rgb(tmp_path / "c.avif")


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.HEIC", b"\0\0\0\x18ftypheic", r"HEIC needs pillow-heif: pip install .*\[recipe\]"),
        ("a.jpg", b"\0\0\0\x18ftypheic\0\0\0\0mif1", "HEIC needs pillow-heif"),
        ("a.avif", b"\0\0\0\x18ftypavif", r"AVIF needs Pillow 11\.3 or newer, .*\[recipe\]"),
        ("a.CR2", b"II*\0", "a camera's raw file, which is not developed here; export it as JPEG"),
        ("a.svg", b"<svg/>", "a kind of image that is not read here; export it as JPEG or PNG"),
    ],
)
def test_kinds_that_cannot_be_read_say_what_would_help(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, content: bytes, reason: str
) -> None:
    monkeypatch.setattr(decode, "formats", lambda: ("JPEG", "PNG", "TIFF"))
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UnreadableImageError, match=reason):
        open_rgb(tmp_path / name)


def test_a_raw_file_is_not_its_thumbnail(tmp_path: Path) -> None:
    path = save(Image.new("RGB", (16, 12)), tmp_path / "a.tif")
    open_rgb(path)
    with pytest.raises(UnreadableImageError, match="a camera's raw file"):
        open_rgb(path.rename(tmp_path / "a.NEF"))


def test_running_out_of_memory_is_not_the_files_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save(Image.new("L", (4, 4)), tmp_path / "a.png")

    def fail(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr(Image, "open", fail)
    with pytest.raises(MemoryError):
        open_rgb(path)


def test_the_error_survives_pickling() -> None:
    error = pickle.loads(pickle.dumps(UnreadableImageError("a.jpg", "broken")))
    assert (type(error), error.path, error.reason) == (UnreadableImageError, "a.jpg", "broken")


def test_the_dataset_gives_tensors_by_position(tmp_path: Path) -> None:
    for index, level in enumerate((10, 20, 30)):
        save(Image.new("L", (6, 4), level), tmp_path / f"{index}.png")
    (tmp_path / "3.png").write_bytes(b"")
    seen = []

    def transform(image: Image.Image) -> torch.Tensor:
        seen.append(image.size)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)

    dataset = ImageDataset(read_images(tmp_path), transform)
    assert len(dataset) == 4
    assert [int(dataset[i][0, 0, 0]) for i in (2, 0, 1)] == [30, 10, 20]
    assert seen == [(6, 4)] * 3
    with pytest.raises(UnreadableImageError, match=r"3\.png: the file is empty"):
        dataset[3]
