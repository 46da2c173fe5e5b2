"""Decoding: every kind of image becomes 8-bit RGB, or an error that names the file."""

from __future__ import annotations

import io
import os
import pickle
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ueo_fast.finetune.data.dataset import ImageDataset
from ueo_fast.finetune.data.decode import UnreadableImageError, open_rgb
from ueo_fast.finetune.data.image_list import read_images


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
    with pytest.raises(UnreadableImageError, match="a pipe, a socket or a device, and no file"):
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
