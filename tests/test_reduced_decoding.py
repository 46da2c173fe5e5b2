"""Reduced decoding: how far a JPEG is reduced, and what that changes of a view."""

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

from ueo_fast.finetune.data import decode
from ueo_fast.finetune.data.dataset import ImageDataset
from ueo_fast.finetune.data.decode import UnreadableImageError, open_rgb, opened
from ueo_fast.finetune.data.image_list import ImageList
from ueo_fast.finetune.data.seeded import seeded
from ueo_fast.finetune.data.transforms import Transform, test_transform, training_transform

# Tensors in grey levels, so that differences read as such.
LEVELS = {"mean": (0.0,) * 3, "std": (1 / 255,) * 3}
CLIP = {"size": 224, **LEVELS}
MODES = [
    CLIP,
    {**CLIP, "interpolation": "bilinear"},
    {**CLIP, "resize_mode": "squash"},
    {**CLIP, "resize_mode": "longest"},
    {**CLIP, "size": (224, 336)},
    {**CLIP, "size": (224, 336), "resize_mode": "squash", "interpolation": "bilinear"},
    {**CLIP, "size": (224, 336), "resize_mode": "longest"},
]


def views(path: Path, transform: Callable[[Image.Image], Tensor], seed: int = 0) -> list[Tensor]:
    """Of the whole image and of the reduced one, with the same random numbers."""
    found = []
    for how in ("full", "auto"):
        with seeded(seed):
            found.append(ImageDataset(ImageList((str(path),), ("a",)), transform, how)[0])
    return found


def difference(path: Path, transform: Transform, seed: int = 0) -> tuple[float, float]:
    """Grey levels, on average and at most."""
    full, auto = views(path, transform, seed)
    assert full.shape == auto.shape
    gap = (full - auto).abs()
    return float(gap.mean()), float(gap.max())


@pytest.mark.parametrize(
    ("size", "reduction"),
    [((3584, 4000), 8), ((3583, 4000), 4), ((1792, 1792), 4), ((896, 897), 2), ((895, 9000), 1)],
)
def test_the_shorter_side_keeps_twice_the_models_size(
    size: tuple[int, int], reduction: int
) -> None:
    wanted = test_transform(CLIP).view(size).max_reduction
    assert max(one for one in (1, 2, 4, 8) if one <= max(wanted, 1)) == reduction


@pytest.mark.parametrize("config", MODES)
@pytest.mark.parametrize("make", [test_transform, training_transform])
def test_no_view_gets_less_than_twice_its_pixels(
    make: Callable[..., Transform], config: dict[str, object], tmp_path: Path
) -> None:
    """Of what is decoded, the part that the view shows; and a smaller size would not do."""
    sizes = [(2000, 1500), (1501, 2003), (1100, 1100), (4001, 999), (600, 500), (100, 90)]
    transform, reductions = make(config), set()
    for number, size in enumerate(sizes):
        path = save_jpeg(Image.new("RGB", size, "teal"), tmp_path / f"{number}.jpg")
        for seed in range(6):
            with opened(path) as encoded, seeded(seed):
                assert encoded.size == size
                view = transform.view(encoded.size)
                decoded = encoded.decode(view.max_reduction)
            kept = [-(-side // decoded.reduction) for side in size]
            assert list(decoded.image.size) == kept
            left, top, right, bottom = view.box
            box = (right - left) / decoded.reduction, (bottom - top) / decoded.reduction
            spare = min(have / need for have, need in zip(box, view.size, strict=True))
            assert decoded.reduction == 1 or spare >= 2
            assert decoded.reduction == 8 or spare < 4
            reductions.add(decoded.reduction)
    assert {1, 2} <= reductions


@pytest.mark.parametrize("config", MODES)
def test_sizes_are_open_clips_own(config: dict[str, object]) -> None:
    """A view of a reduced image is resized to what the whole one would be."""
    whole = image_transform_v2(PreprocessCfg(**{**vars(PreprocessCfg()), **config}), is_train=False)
    ours = test_transform({**vars(PreprocessCfg()), **config})
    for size in [(640, 427), (427, 640), (337, 336), (224, 224), (90, 700), (701, 91), (113, 339)]:
        image = real_photo(0, size)
        assert ours.view(size).size == whole.transforms[0](image).size
        assert torch.equal(ours(image), whole(image))


def test_small_images_are_decoded_in_full(tmp_path: Path) -> None:
    path = save_jpeg(real_photo(0, (640, 427)), tmp_path / "a.jpg")
    for transform in (test_transform(CLIP), training_transform(CLIP)):
        assert torch.equal(*views(path, transform))


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize(
    ("size", "mean", "most"),
    [((4000, 3000), 0.3, 4), ((4001, 2999), 0.3, 5), ((1633, 1225), 0.4, 8)],
)
def test_views_differ_by_a_few_grey_levels(
    tmp_path: Path, number: int, size: tuple[int, int], mean: float, most: float
) -> None:
    """Bounds slightly above the guide's figures for 12 and 2 megapixels; one size is not a multiple
    of the reduction."""
    path = save_jpeg(real_photo(number, size, (0, 0, 569, 427)), tmp_path / "a.jpg")
    found = difference(path, test_transform(CLIP))
    assert 0 < found[0] < mean
    assert found[1] <= most
    for seed in range(3):
        found = difference(path, training_transform(CLIP), seed)
        assert 0 < found[0] < 0.5
        assert found[1] <= 15


@pytest.mark.parametrize("orientation", range(1, 9))
def test_rotated_images_keep_their_edges(tmp_path: Path, orientation: int) -> None:
    """A reduced side is rounded up; what is added comes first where the camera was turned. Here it
    is 7/8 of a pixel (1001 = 125 * 8 + 1), and ignoring that would be seen."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = real_photo(0, (1001, 801)).filter(ImageFilter.GaussianBlur(6))
    path = save_jpeg(image, tmp_path / "a.jpg", exif=exif, quality=95)
    config = {**CLIP, "size": 50, "resize_mode": "squash"}
    with opened(path) as encoded:
        assert encoded.size == open_rgb(path).size
        decoded = encoded.decode(8)
    sides = (101, 126) if orientation > 4 else (126, 101)
    assert (decoded.image.size, decoded.reduction) == (sides, 8)
    assert (decoded.left > 0, decoded.top > 0) == (
        orientation in (2, 3, 6, 7),
        orientation in (3, 4, 7, 8),
    )
    view = test_transform(config).view(encoded.size)
    whole = test_transform(config)(open_rgb(path))
    assert float((view.of(decoded) - whole).abs().mean()) < 0.5
    if decoded.left or decoded.top:
        displaced = view.of(decoded._replace(left=0.0, top=0.0))
        assert float((displaced - whole).abs().mean()) > 0.8


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
    with opened(path) as encoded:
        decoded = encoded.decode(2.5)
    assert (decoded.image.size, decoded.image.mode) == ((550, 450), "RGB")
    mean, most = difference(path, test_transform({**CLIP, "size": 128}))
    assert 0 < mean < 1
    assert most < 16


def test_other_formats_are_decoded_in_full(tmp_path: Path) -> None:
    image = real_photo(1, (500, 400))
    deep = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
    clear = image.quantize(40)
    clear.info["transparency"] = 3
    exif = Image.Exif()
    exif[0x0112] = 6
    kinds = {"a.png": image, "b.webp": image, "c.tif": image, "d.png": deep, "e.png": clear}
    for name, one in kinds.items():
        one.save(tmp_path / name, exif=exif)
        assert torch.equal(*views(tmp_path / name, test_transform({**CLIP, "size": 32})))
        with opened(tmp_path / name) as encoded:
            assert encoded.size == encoded.decode(8).image.size == (400, 500)


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
