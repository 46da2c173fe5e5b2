"""From an image file to RGB, whatever kind of file it is."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Callable, Iterator
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

from PIL import ExifTags, Image, ImageFile, ImageOps, UnidentifiedImageError

from ueo_fast.finetune.data.names import printable, shown

if TYPE_CHECKING:  # lists of images need this module, but no numpy
    import numpy as np
    import numpy.typing as npt

    Levels = npt.NDArray[np.float64]

OVERSAMPLING = 2
"""Pixels per side that a copy has for each pixel of the model's, if the image has so many."""

# The only formats that are ever opened: those that Pillow decodes itself, and HEIF with
# pillow-heif. Not EPS and WMF, which start other programs, nor formats that contain another file
# of any size (ICO, ICNS, FITS). TGA comes last, because it has no signature.
_FORMATS = (
    *("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "DIB", "AVIF", "HEIF", "JPEG2000"),
    *("PPM", "PSD", "PCX", "SGI", "SUN", "DDS", "QOI", "XBM", "TGA"),
)
_HEIF = "HEIC needs pillow-heif: pip install pillow-heif (the extra [recipe] brings it)"
_AVIF = (
    "AVIF needs Pillow 11.3 or newer, built with it: pip install --upgrade pillow (the extra "
    "[recipe] brings it)"
)
_RAW = (
    *(".3fr", ".arw", ".cr2", ".cr3", ".crw", ".dcr", ".dng", ".eip", ".erf", ".fff"),
    *(".gpr", ".iiq", ".k25", ".kdc", ".mef", ".mos", ".mrw", ".nef", ".nrw", ".orf", ".pef"),
    *(".raf", ".raw", ".rw2", ".rwl", ".rwz", ".sr2", ".srf", ".srw", ".x3f"),
)
_OTHERS = (
    *(".ai", ".bpg", ".cur", ".dcm", ".djvu", ".emf", ".eps", ".exr", ".fit", ".fits", ".flif"),
    *(".hdp", ".hdr", ".icns", ".ico", ".jls", ".jph", ".jxl", ".jxr", ".pct", ".pict", ".ps"),
    *(".psb", ".svg", ".svgz", ".wdp", ".wmf", ".xcf", ".xpm"),
)
UNREADABLE: dict[str, str] = {
    **dict.fromkeys((".heic", ".heics", ".heif", ".heifs", ".hif"), _HEIF),
    **dict.fromkeys((".avif", ".avifs"), _AVIF),
    # By its extension: its content looks like a TIFF, of which Pillow would take the thumbnail.
    **dict.fromkeys(_RAW, "a camera's raw file, which is not developed here; export it as JPEG"),
    **dict.fromkeys(_OTHERS, "a kind of image that is not read here; export it as JPEG or PNG"),
}
"""Extensions of image files that cannot be read, or not without a package, and why."""

MOST_BYTES = 2**30
"""Memory limit for decoding one image."""
_MAX_ASPECT = 1000
"""Resizing enlarges the short side to the model's size, and the long side with it."""
_BAND = 2**20
"""Pixels that are converted at a time."""
_REDUCIBLE = ("JPEG", "MPO")
"""Formats with a reduced-size decoder: libjpeg computes fewer pixels from the same data."""

# Bytes per pixel that Pillow stores; 4 in all other modes. Measured, like those below.
_KEPT = {"1": 1, "L": 1, "P": 1, "I;16": 2, "I;16B": 2, "I;16L": 2, "I;16N": 2}
# Bytes per pixel of the decoder's own buffers.
_HELD = {"WEBP": 12, "AVIF": 8, "HEIF": 8, "JPEG2000": 16}


class UnreadableImageError(ValueError):
    """An image file that cannot be decoded. It survives pickling, as workers send it on.

    Args:
        path: of the file.
        reason: what is wrong with it.
    """

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(path, reason)
        self.path = path
        self.reason = reason

    def __str__(self) -> str:
        return f"{shown(self.path)}: {self.reason}"


@cache
def formats() -> tuple[str, ...]:
    """Formats, as Pillow calls them, that can be read here."""
    with contextlib.suppress(ImportError):
        from pillow_heif import register_heif_opener

        register_heif_opener()
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


@cache
def readable_extensions() -> frozenset[str]:
    """Extensions of the image files that can be read here, lower case with the dot."""
    readable = {*formats(), "MPO"}  # first: it registers more. To Pillow an MPO is a JPEG.
    return frozenset(
        extension for extension, name in Image.registered_extensions().items() if name in readable
    )


class Decoded(NamedTuple):
    """An image as RGB, or a smaller version of it.

    Attributes:
        image: 8-bit RGB, with the camera's orientation applied.
        reduction: pixels of the whole image per pixel of ``image`` and side: 1, 2, 4 or 8.
        left: column of ``image`` where the left edge of the whole image lies. Sides are rounded
            up, so the edge that was the right one before the orientation was applied lies within a
            pixel.
        top: the same of rows.
    """

    image: Image.Image
    reduction: int = 1
    left: float = 0.0
    top: float = 0.0

    def box(self, size: tuple[int, int]) -> tuple[float, float, float, float]:
        """(left, top, right, bottom) in ``image`` of a whole image of ``size``."""
        width, height = (side / self.reduction for side in size)
        return self.left, self.top, self.left + width, self.top + height


class EncodedImage:
    """An open image file. JPEGs are decoded by :meth:`decode`, other formats on opening.

    Args:
        path: of the file.
        image: as Pillow opened it.

    Attributes:
        size: (width, height) of the whole image, with the camera's orientation applied.
    """

    def __init__(self, path: str | os.PathLike[str], image: Image.Image) -> None:
        self._path = path
        self._image = image
        self._orientation: object = 1
        if image.format not in _REDUCIBLE:
            self._image = _upright(image)
            self.size = self._image.size
            return
        with contextlib.suppress(Exception):  # its EXIF may be broken where its pixels are not
            self._orientation = image.getexif().get(ExifTags.Base.Orientation)
        sideways = self._orientation in (5, 6, 7, 8)
        self.size = (image.height, image.width) if sideways else image.size

    def decode(self, max_reduction: float = 1) -> Decoded:
        """Decode the pixels, reduced by at most ``max_reduction`` per side.

        Formats without a reduced-size decoder are decoded in full.

        Raises:
            UnreadableImageError: the file is truncated or corrupt, or has grey levels that are not
                numbers.
        """
        with _errors_of(self._path):
            if self._image.format not in _REDUCIBLE:
                return Decoded(_rgb(self._image))
            reduction = self._reduce(max_reduction)
            image = _rgb(_upright(self._image))
        left, top = (-side % reduction / reduction for side in self.size)
        return Decoded(
            image,
            reduction,
            left if self._orientation in (2, 3, 6, 7) else 0.0,
            top if self._orientation in (3, 4, 7, 8) else 0.0,
        )

    def _reduce(self, max_reduction: float) -> int:
        wanted = next((reduction for reduction in (8, 4, 2) if reduction <= max_reduction), 1)
        width, height = self._image.size
        least = max(1, width // wanted), max(1, height // wanted)
        drafted = self._image.draft(None, least) if wanted > 1 else None
        return 1 if drafted is None else round(width / drafted[1][2])


@contextlib.contextmanager
def opened(path: str | os.PathLike[str]) -> Iterator[EncodedImage]:
    """Open an image file, to decode as much of it as is needed; see also :func:`open_rgb`.

    Raises:
        UnreadableImageError: see :func:`open_rgb`.
    """
    with contextlib.ExitStack() as stack:
        with _errors_of(path):
            mode = os.stat(path).st_mode
            if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):  # reading one may block forever
                raise ValueError("not a regular file (a pipe, socket or device)")
            if _extension(path) in _RAW:
                raise ValueError(UNREADABLE[_extension(path)])
            image = stack.enter_context(Image.open(path, formats=formats()))
            _check_sides(image)
            _check_memory(image)  # of the whole image, so that a file is refused or not at any size
            encoded = EncodedImage(path, image)
        yield encoded


def open_rgb(path: str | os.PathLike[str]) -> Image.Image:
    """Decode an image file as 8-bit RGB, all of its pixels.

    The format is detected from the content; only camera raw files are recognised by their
    extension, and refused. The camera's orientation (EXIF) is applied. Grey, palette and CMYK are
    converted as Pillow does (including Adobe's inverted CMYK). Transparent areas become white. Of
    an animation, only the first frame is used. Grey levels of more than 8 bits are scaled, not
    clipped: 16 bits by 257; integers of 32 bits as 16 bits if they fit, otherwise from their own
    minimum and maximum to 0 and 255; floating point from [0, 1] or [0, 255] if it fits, otherwise
    from its own minimum and maximum.

    Raises:
        UnreadableImageError: the file is missing, empty, truncated, corrupt or not an image of
            :func:`formats`; it has more than ``2 * PIL.Image.MAX_IMAGE_PIXELS`` pixels, sides of
            more than 1000 to 1, or takes more than :data:`MOST_BYTES` to decode.
    """
    with opened(path) as encoded:
        return encoded.decode().image


def as_rgb(image: Image.Image, name: str) -> Image.Image:
    """As :func:`open_rgb`, from an image that is already open; it is not changed.

    Raises:
        UnreadableImageError: the image, called ``name``, cannot be decoded.
    """
    with _errors_of(name):
        _check_sides(image)
        if isinstance(image, ImageFile.ImageFile):  # else it is decoded already
            _check_memory(image)
        return _rgb(_upright(image, in_place=False))


@contextlib.contextmanager
def _errors_of(path: str | os.PathLike[str]) -> Iterator[None]:
    try:
        yield
    except MemoryError:  # says nothing about the file
        raise
    # On broken bytes Pillow's decoders raise anything: OSError, SyntaxError, struct.error, ...
    except Exception as error:
        raise UnreadableImageError(printable(path), _reason(path, error)) from error


def _upright(image: Image.Image, *, in_place: bool = True) -> Image.Image:
    """Decode the image and apply the camera's orientation; without ``in_place`` to a copy."""
    image.load()
    with contextlib.suppress(Exception):  # its EXIF may be broken where its pixels are not
        if not in_place:
            return ImageOps.exif_transpose(image)
        ImageOps.exif_transpose(image, in_place=True)
    return image


def _check_sides(image: Image.Image) -> None:
    if 0 in image.size or max(image.size) > _MAX_ASPECT * min(image.size):
        limit = "without area" if 0 in image.size else f"more than {_MAX_ASPECT} to 1"
        raise ValueError(f"sides of {image.width} x {image.height} pixels, {limit}")


def _check_memory(image: Image.Image) -> None:
    """Refuse small files that decode to huge images: pixels times depth, with all buffers."""
    kept = _KEPT.get(image.mode, 4)
    held = _HELD.get(image.format or "", 0)
    if image.info.get("progressive"):  # JPEG: the coefficients of three channels
        held += 6
    result = 0 if image.mode == "RGB" and not image.has_transparency_data else 4
    needed = image.width * image.height * (kept + held + result) + _tiff_block(image)
    if needed > MOST_BYTES:
        raise ValueError(
            f"{image.width} x {image.height} pixels ({image.format}, mode {image.mode}) take "
            f"{needed / 2**20:.0f} MiB to decode, more than the limit of {MOST_BYTES / 2**20:.0f} "
            "MiB; make it smaller"
        )


def _tiff_block(image: Any) -> int:
    """Bytes of a strip or tile, which libtiff decodes at once and which may exceed the image."""
    if not (image.tile and image.tile[0][0] == "libtiff"):
        return 0
    tags = image.tag_v2
    width, height = tags.get(322), tags.get(323)  # of tiles
    if not (width and height):
        width, height = image.width, min(tags.get(278, 0), image.height)  # rows per strip
    return int(width) * int(height) * int(tags.get(277, 1)) * int(max(tags.get(258, (8,)))) // 8


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and not image.has_transparency_data:
        return image
    convert = _conversion(image)
    result = Image.new("RGB", image.size)
    for top, band in _bands(image):
        result.paste(convert(band), (0, top))
    return result


def _bands(image: Image.Image) -> Iterator[tuple[int, Image.Image]]:
    """Pieces of the image from top to bottom: what is made of each stays small."""
    rows = max(1, _BAND // image.width)
    for top in range(0, image.height, rows):
        yield top, image.crop((0, top, image.width, min(top + rows, image.height)))


def _conversion(image: Image.Image) -> Callable[[Image.Image], Image.Image]:
    """A function that converts each band to RGB."""
    import numpy as np

    if image.mode.startswith("I;16"):
        return lambda band: _grey(np.asarray(band) / 257)
    if image.mode in ("I", "F"):
        scaled = _scaling(image, (65535,) if image.mode == "I" else (1, 255))
        return lambda band: _grey(scaled(np.asarray(band).astype(np.float64)))
    if image.has_transparency_data:
        return _on_white
    return lambda band: band.convert("RGB")


def _on_white(band: Image.Image) -> Image.Image:
    opaque = Image.new("RGBA", band.size, "white")
    opaque.alpha_composite(band.convert("RGBA"))
    return opaque.convert("RGB")


def _scaling(image: Image.Image, ranges: tuple[int, ...]) -> Callable[[Levels], Levels]:
    """A function that scales levels to [0, 255]: from 0 to the first of ``ranges`` that holds them
    all, otherwise from their own minimum to their maximum."""
    import numpy as np

    low, high = np.inf, -np.inf
    for _, band in _bands(image):
        levels = np.asarray(band)
        if not np.isfinite(levels).all():
            raise ValueError("grey levels that are infinite or not a number")
        low, high = min(low, float(levels.min())), max(high, float(levels.max()))
    for top in ranges:
        if low >= 0 and high <= top:
            return lambda levels: levels * (255 / top)
    if high == low:
        return np.zeros_like
    # Halves, as the difference of two floats may be infinite.
    return lambda levels: (levels / 2 - low / 2) * (255 / (high / 2 - low / 2))


def _grey(levels: Levels) -> Image.Image:
    import numpy as np

    return Image.fromarray(np.rint(levels).astype(np.uint8)).convert("RGB")


def _reason(path: str | os.PathLike[str], error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        if os.path.getsize(path) == 0:
            return "the file is empty"
        why = UNREADABLE.get(_extension(path)) or _kind_of_content(path)
        if why is None or {_HEIF: "HEIF", _AVIF: "AVIF"}.get(why) in formats():
            return f"damaged, or no image in a format that is read here ({', '.join(formats())})"
        return why
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    words = printable(str(error)).split()
    return shown(" ".join(words)) if words else type(error).__name__


def _kind_of_content(path: str | os.PathLike[str]) -> str | None:
    """Why a HEIC or AVIF file with another extension, as some phones name them, cannot be read."""
    with open(path, "rb") as file:
        head = file.read(12)
    if head[4:8] != b"ftyp":
        return None
    if head[8:12] in (b"avif", b"avis"):
        return _AVIF
    return _HEIF if head[8:12] in (b"heic", b"heix", b"heif", b"mif1", b"msf1", b"hevc") else None


def _extension(path: str | os.PathLike[str]) -> str:
    return os.path.splitext(os.fspath(path))[1].lower()
