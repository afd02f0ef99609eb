"""The one place where images are decoded and encoded.

Every image that iris_hf hands out is what ``PIL.Image.open(...).convert("RGB")`` gives, with one exception: an image
of 16 bits per pixel keeps the upper 8, as Pillow itself does for 16-bit colour, because its plain conversion of
16-bit greyscale cuts everything above 255 to white. (An image of 32-bit integers counts as one of 16 bits where a
pixel is above 255, else as one of 8.) An EXIF orientation is *not* applied, since boxes and masks
refer to the pixels as they are stored. Transparency is dropped.
"""

from __future__ import annotations

import io
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

from iris_hf.errors import DataError

_SIXTEEN_BIT_MODES = ("I", "I;16", "I;16B", "I;16L", "I;16N")


def decode_image(source: Any, where: str = "") -> PIL.Image.Image:
    """Decode an image to RGB.

    Args:
        source: Encoded bytes, a path (local, or a URL that `datasets` can open), a mapping with ``bytes`` and
            ``path`` as `datasets` stores images, or a PIL image.
        where: What an error message starts with, such as ``"Example 1043: "``.

    Returns:
        A PIL image of mode RGB.

    Raises:
        DataError: If the source is missing, truncated or no image.
    """
    try:
        return to_rgb(_open(source, where))
    except _DECODING_ERRORS as error:
        raise _undecodable(source, error, where) from error


def to_rgb(image: PIL.Image.Image) -> PIL.Image.Image:
    """Convert a PIL image of any mode to RGB, by the rules of this module.

    Args:
        image: The image; it is not changed.

    Raises:
        DataError: If the mode has no defined range, such as floating point.
    """
    if image.mode in _SIXTEEN_BIT_MODES:
        values = np.asarray(image)
        if values.size and (values.min() < 0 or values.max() > 65535):
            raise DataError(f"pixels of a 16-bit image are in 0..65535, not {values.min()}..{values.max()}.")
        has_16_bits = image.mode != "I" or image.format == "PNG" or values.max(initial=0) > 255
        return PIL.Image.fromarray((values >> 8 if has_16_bits else values).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise DataError("a floating-point image has no defined range; convert it to 8 bits first.")
    if image.mode == "P" and isinstance(image.info.get("transparency"), bytes):
        image = image.convert("RGBA")  # the same colours as the direct way, without Pillow's warning
    return image.convert("RGB")


def encode_image(source: Any, where: str = "") -> bytes:
    """Give the encoded bytes of an image: the original ones where the source has them, else PNG.

    A PIL image has original bytes when it was opened from a file or buffer that can still be read *and* its pixels
    still equal the ones in there, so that edits are never lost.

    Args:
        source: As for :func:`decode_image`.
        where: What an error message starts with.

    Returns:
        Bytes that :func:`decode_image` turns into the same pixels as the source.

    Raises:
        DataError: If the source is missing, truncated or no image.
    """
    if not isinstance(source, PIL.Image.Image):
        return read_image_bytes(source, where)
    try:
        return _original_bytes(source) or _png(source)
    except _DECODING_ERRORS as error:
        raise _undecodable(source, error, where) from error


def image_size(source: Any, where: str = "") -> tuple[int, int]:
    """Width and height in pixels, from the header alone: nothing is decoded.

    Args:
        source: As for :func:`decode_image`.
        where: What an error message starts with.

    Raises:
        DataError: If the source is missing or no image.
    """
    try:
        return _open(source, where).size
    except _DECODING_ERRORS as error:
        raise _undecodable(source, error, where) from error


def image_format(source: Any, where: str = "") -> str:
    """The name of an encoded image's format, such as ``"JPEG"``, from the header alone.

    Args:
        source: As for :func:`decode_image`, but no PIL image.
        where: What an error message starts with.

    Raises:
        DataError: If the source is missing or no image.
    """
    try:
        return str(_open(source, where).format)
    except _DECODING_ERRORS as error:
        raise _undecodable(source, error, where) from error


def read_image_bytes(source: Any, where: str = "") -> bytes:
    """Read the encoded bytes of an image that is not a PIL image.

    Args:
        source: Encoded bytes, a path, or a mapping with ``bytes`` and ``path``.
        where: What an error message starts with.

    Raises:
        DataError: If there is no such file, or the source is nothing that holds an image.
    """
    if isinstance(source, bytes):
        return source
    if isinstance(source, (bytearray, memoryview)):
        return bytes(source)
    if isinstance(source, Mapping) and source.get("bytes") is not None:
        return read_image_bytes(source["bytes"], where)
    path = source.get("path") if isinstance(source, Mapping) else source
    if not isinstance(path, (str, os.PathLike)):
        found = "nothing" if path is None else f"a {type(path).__name__}"
        raise DataError(f"{where}an image is a PIL image, encoded bytes or a path, not {found}.")
    path = os.fspath(path)
    try:
        if "://" in path:
            from datasets.download.download_config import DownloadConfig
            from datasets.utils.file_utils import xopen

            with xopen(path, "rb", download_config=DownloadConfig()) as file:
                return file.read()  # type: ignore[no-any-return]
        return Path(path).read_bytes()
    except OSError as error:
        raise DataError(f"{where}cannot read the image file {path!r}: {error.strerror or error}.") from error


# Pillow's decoders raise any of these on broken files.
_DECODING_ERRORS = (
    OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, OverflowError, MemoryError,
    PIL.Image.DecompressionBombError,
)  # fmt: skip


def open_image(data: bytes) -> PIL.Image.Image:
    """Read the header of an encoded image; its pixels are decoded as they are asked for.

    Raises:
        DataError: If it is a program: Pillow has Ghostscript run the PostScript in a file of EPS.
        OSError: If it is no image.
    """
    image = PIL.Image.open(io.BytesIO(data))
    if image.format == "EPS":
        raise DataError("it is EPS, a program that is not run. Convert it to PNG.")
    return image


def _open(source: Any, where: str) -> PIL.Image.Image:
    if isinstance(source, PIL.Image.Image):
        return source
    data = read_image_bytes(source, where)
    try:
        return open_image(data)
    except DataError as error:
        raise DataError(f"{where}{_name_of(source)} cannot be decoded: {error}") from error


def _undecodable(source: Any, error: BaseException, where: str) -> DataError:
    if isinstance(error, DataError):
        return error if str(error).startswith(where) else DataError(where + str(error))
    name = _name_of(source)
    if isinstance(error, PIL.UnidentifiedImageError):
        return DataError(f"{where}{name} is no image that Pillow knows. Replace the file or drop the example.")
    return DataError(f"{where}{name} cannot be decoded: {error}. Replace the file or drop the example.")


def _name_of(source: Any) -> str:
    if isinstance(source, Mapping):
        return _name_of(source["bytes"]) if source.get("bytes") is not None else _name_of(source.get("path"))
    if isinstance(source, (bytes, bytearray, memoryview)):
        return f"data of {len(source)} bytes that starts with {bytes(source[:8])!r}"
    if isinstance(source, PIL.Image.Image):
        return f"the image {getattr(source, 'filename', '') or source!r}"
    return f"the image file {os.fspath(source)!r}"


def _original_bytes(image: PIL.Image.Image) -> bytes | None:
    file, name = getattr(image, "fp", None), getattr(image, "filename", "")
    if name and os.path.isfile(name):
        data = Path(name).read_bytes()
    elif file is not None and not file.closed:
        position = file.tell()
        file.seek(0)
        data = file.read()
        file.seek(position)
    else:
        return None
    try:
        stored = PIL.Image.open(io.BytesIO(data))
    except PIL.UnidentifiedImageError:
        return None
    same = stored.mode == image.mode and stored.size == image.size and stored.getpalette() == image.getpalette()
    return data if same and stored.tobytes() == image.tobytes() else None


def _png(image: PIL.Image.Image) -> bytes:
    buffer = io.BytesIO()
    plain = image if image.mode in ("1", "L", "RGB") else to_rgb(image)
    plain.save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()
