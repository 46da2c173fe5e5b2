"""Copies with twice the model's pixels: how they are decoded, and what they change of a view."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image, ImageFilter
from real_photos import real_photo, save_jpeg
from torch import Tensor

from ueo_fast.finetune.data import copies, decode
from ueo_fast.finetune.data.copies import Picture, as_picture, read_picture
from ueo_fast.finetune.data.decode import Decoded, EncodedImage, UnreadableImageError, open_rgb
from ueo_fast.finetune.data.image_list import ImageList
from ueo_fast.finetune.data.loader import seeded
from ueo_fast.finetune.data.transforms import (
    Transform,
    normalize,
    test_transform,
    training_transform,
)
from ueo_fast.finetune.data.views import ImageDataset

CLIP = {"size": 224}
MODES = [
    CLIP,
    {**CLIP, "interpolation": "bilinear"},
    {**CLIP, "resize_mode": "squash"},
    {**CLIP, "resize_mode": "longest", "fill_color": 9},
    {**CLIP, "size": (224, 336)},
    {**CLIP, "size": (224, 336), "resize_mode": "squash", "interpolation": "bilinear"},
    {**CLIP, "size": (224, 336), "resize_mode": "longest"},
]


def views(path: Path, transform: Callable[[Image.Image], Tensor], seed: int = 0) -> list[Tensor]:
    """Of all pixels and of the copy, with the same random numbers."""
    found = []
    for how in ("full", "auto"):
        with seeded(seed):
            found.append(ImageDataset(ImageList((str(path),), ("a",)), transform, how)[0])
    return found


def gap(one: Tensor, other: Tensor) -> tuple[float, float]:
    """Grey levels, on average and at most."""
    assert one.shape == other.shape
    assert one.dtype == other.dtype == torch.uint8
    levels = (one.float() - other.float()).abs()
    return float(levels.mean()), float(levels.max())


@pytest.mark.parametrize(
    ("size", "reduction"),
    [((3584, 4000), 8), ((3583, 4000), 4), ((1792, 1792), 4), ((896, 897), 2), ((895, 9000), 1)],
)
def test_jpegs_are_decoded_with_at_least_twice_the_models_pixels(
    size: tuple[int, int], reduction: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[Decoded] = []
    whole = EncodedImage.decode

    def spy(self: EncodedImage, max_reduction: float) -> Decoded:
        found.append(whole(self, max_reduction))
        return found[-1]

    monkeypatch.setattr(EncodedImage, "decode", spy)
    path = save_jpeg(Image.new("RGB", size, "teal"), tmp_path / "a.jpg")
    read_picture(path, (224, 224))
    (decoded,) = found
    assert decoded.reduction == reduction
    assert decoded.image.size == tuple(-(-side // reduction) for side in size)


@pytest.mark.parametrize("view", [(224, 224), (336, 224), (10, 30)])
def test_a_copy_has_twice_the_models_pixels_or_all_there_are(
    view: tuple[int, int], tmp_path: Path
) -> None:
    for size in [(2000, 1500), (1501, 2003), (1100, 1100), (4001, 999), (600, 500), (100, 90)]:
        path = save_jpeg(Image.new("RGB", size, "teal"), tmp_path / "a.jpg")
        found = read_picture(path, view)
        assert found.size == size
        rows, columns = found.pixels.shape[1:]
        wanted = min(2.0, min(side / needed for side, needed in zip(size, view, strict=True)))
        spare = min(columns / view[0], rows / view[1])
        assert spare == pytest.approx(wanted, abs=0.51 / min(view))
        assert columns / rows == pytest.approx(size[0] / size[1], rel=2 / min(rows, columns))


@pytest.mark.parametrize("config", MODES)
def test_geometry_is_open_clips_own(config: dict[str, object]) -> None:
    """Of all pixels to the bit; of a copy to the grey levels of another resizer."""
    whole = image_transform_v2(PreprocessCfg(**{**vars(PreprocessCfg()), **config}), is_train=False)
    ours = test_transform({**vars(PreprocessCfg()), **config})
    mean, std = (torch.tensor(whole.transforms[-1].__dict__[name]) for name in ("mean", "std"))
    for size in [(640, 427), (427, 640), (337, 336), (224, 224), (90, 700), (701, 91), (113, 339)]:
        image = real_photo(0, size)
        assert torch.equal(normalize(ours(image), mean, std), whole(image))
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        found = gap(ours.of(Picture(pixels, size)), ours(image))
        assert found[0] < 0.2
        assert found[1] <= 5  # where rounding between the two directions differs


def test_small_images_are_not_resized_twice(tmp_path: Path) -> None:
    path = save_jpeg(real_photo(0, (640, 427)), tmp_path / "a.jpg")
    for transform in (test_transform(CLIP), training_transform(CLIP)):
        mean, most = gap(*views(path, transform))
        assert mean < 0.05
        assert most <= 1


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize(
    ("size", "mean", "most"),
    [((4000, 3000), 0.6, 7), ((4001, 2999), 0.6, 7), ((1633, 1225), 0.6, 9)],
)
def test_views_differ_by_a_few_grey_levels(
    tmp_path: Path, number: int, size: tuple[int, int], mean: float, most: float
) -> None:
    """Bounds slightly above the guide's figures for 12 and 2 megapixels; one size is not a multiple
    of the reduction."""
    path = save_jpeg(real_photo(number, size, (0, 0, 569, 427)), tmp_path / "a.jpg")
    found = gap(*views(path, test_transform(CLIP)))
    assert 0 < found[0] < mean
    assert found[1] <= most
    for seed in range(3):  # the crop is rounded to pixels of the copy, half a pixel of the view's
        found = gap(*views(path, training_transform(CLIP), seed))
        assert 0 < found[0] < 4.5


def test_crops_are_those_of_the_whole_image(tmp_path: Path) -> None:
    """A ramp from left to right says where a crop lies."""
    ramp = Image.fromarray(np.tile(np.linspace(0, 255, 2000).astype(np.uint8), (1500, 1)))
    path = save_jpeg(ramp.convert("RGB"), tmp_path / "a.jpg")
    drawn = set()
    for seed in range(8):
        full, auto = views(path, training_transform(CLIP), seed)
        assert float((full.float() - auto.float()).abs().max()) <= 2  # levels: 0.8% of the width
        drawn.add(int(full[0, 0, 0]))
    assert len(drawn) > 5


@pytest.mark.parametrize("orientation", range(1, 9))
def test_rotated_images_keep_their_edges(
    tmp_path: Path, orientation: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reduced side is rounded up; what is added comes first where the camera was turned. Here it
    is 7/8 of a pixel (1001 = 125 * 8 + 1), and ignoring that would be seen."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = real_photo(0, (1001, 801)).filter(ImageFilter.GaussianBlur(6))
    path = save_jpeg(image, tmp_path / "a.jpg", exif=exif, quality=95)
    view = (50, 50)
    whole = as_picture(open_rgb(path), "a", view)
    found = read_picture(path, view)
    sides = (801, 1001) if orientation > 4 else (1001, 801)
    assert whole.size == found.size == sides
    assert gap(found.pixels, whole.pixels)[0] < 0.5
    monkeypatch.setattr(Decoded, "box", lambda decoded, size: (0, 0, *decoded.image.size))
    assert gap(read_picture(path, view).pixels, whole.pixels)[0] > 0.8


def save_as(kind: str, path: Path) -> Path:
    image = real_photo(0, (1100, 900))
    if kind in ("L", "CMYK"):
        return save_jpeg(image.convert(kind), path)
    if kind == "MPO":
        image.save(path, "MPO", save_all=True, append_images=[image.rotate(180)])
        return path
    options = {"progressive": {"progressive": True}, "full chroma": {"subsampling": 0}}
    if kind == "broken EXIF":
        return save_jpeg(image, path, exif=b"Exif\0\0MM\0*\0\0\0\x08\xff")
    return save_jpeg(image, path, **options[kind])


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize("kind", ["L", "CMYK", "MPO", "progressive", "full chroma", "broken EXIF"])
def test_every_kind_of_jpeg_is_reduced(tmp_path: Path, kind: str) -> None:
    path = save_as(kind, tmp_path / "a.jpg")
    with decode.opened(path) as encoded:
        decoded = encoded.decode(2.5)
    assert (decoded.image.size, decoded.image.mode) == ((550, 450), "RGB")
    mean, most = gap(*views(path, test_transform({"size": 128})))
    assert 0 < mean < 1
    assert most < 16


def test_other_formats_are_shrunk_as_well(tmp_path: Path) -> None:
    image = real_photo(1, (500, 400))
    deep = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
    clear = image.quantize(40)
    clear.info["transparency"] = 3
    exif = Image.Exif()
    exif[0x0112] = 6
    kinds = {"a.png": image, "b.webp": image, "c.tif": image, "d.png": deep, "e.png": clear}
    for name, one in kinds.items():
        one.save(tmp_path / name, exif=exif)
        assert read_picture(tmp_path / name, (32, 32)).pixels.shape == (3, 80, 64)
        mean, most = gap(*views(tmp_path / name, test_transform({"size": 32})))
        assert 0 < mean < 1.5
        assert most < 16


def test_huge_images_are_shrunk_without_a_second_copy_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.png"
    real_photo(0, (640, 427)).save(path)
    by_torch = read_picture(path, (64, 64))
    sizes: list[int] = []
    whole = np.array
    monkeypatch.setattr(copies.np, "array", lambda i: sizes.append(i.width) or whole(i))
    monkeypatch.setattr(copies, "_MOST_PIXELS", 1000)
    by_pillow = read_picture(path, (64, 64))
    assert sizes == [192]
    assert gap(by_torch.pixels, by_pillow.pixels)[1] <= 1


def test_a_plain_callable_gets_the_whole_image(tmp_path: Path) -> None:
    path = save_jpeg(real_photo(0, (2000, 1500)), tmp_path / "a.jpg")
    assert views(path, lambda image: torch.tensor(image.size))[1].tolist() == [2000, 1500]


def test_files_are_refused_as_by_full_decoding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save_jpeg(real_photo(0, (2000, 1500)), tmp_path / "a.jpg")
    content = path.read_bytes()
    (tmp_path / "b.jpg").write_bytes(content[: len(content) // 2])
    (tmp_path / "c.jpg").write_bytes(content[:300])
    (tmp_path / "d.jpg").write_bytes(b"")
    monkeypatch.setattr(decode, "MOST_BYTES", 10 << 20)
    for name in ("a.jpg", "b.jpg", "c.jpg", "d.jpg", "gone.jpg"):
        said = []
        for how in ("full", "auto"):
            images = ImageList((str(tmp_path / name),), ("a",))
            with pytest.raises(UnreadableImageError) as error:
                ImageDataset(images, test_transform(CLIP), how)[0]
            said.append(str(error.value))
        assert said[0] == said[1]
        monkeypatch.undo()  # the first is refused for its size, the others for what they are


@pytest.mark.parametrize("size", [(1, 1000), (1000, 1)])
def test_an_extreme_panorama_keeps_a_pixel(size: tuple[int, int]) -> None:
    """Of 32 by 32, open_clip's rounding would leave it none on its shorter side."""
    picture = as_picture(Image.new("RGB", size, "teal"), "a", (32, 32))
    for mode in ("longest", "shortest", "squash"):
        assert test_transform({"size": 32, "resize_mode": mode}).of(picture).shape == (3, 32, 32)


def test_transforms_know_the_size_they_make() -> None:
    for make in (test_transform, training_transform):
        transform: Transform = make({"size": (20, 30)})
        assert transform.size == (30, 20)
        assert transform(real_photo(0, (64, 48))).shape == (3, 20, 30)
