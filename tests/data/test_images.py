import io
import warnings

import numpy as np
import PIL.Image
import pytest
from data_examples import assert_same_image, encode, noise

from iris_hf.data.hf_targets import _decode_mask
from iris_hf.data.images import decode_image, encode_image, image_size, to_rgb
from iris_hf.errors import DataError


def _odd_images() -> dict[str, bytes]:
    image = noise(0, 20, 12)
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees
    palette = image.convert("P", palette=PIL.Image.Palette.ADAPTIVE)
    return {
        "exif": encode(image, "JPEG", exif=exif),
        "cmyk": encode(image.convert("CMYK"), "JPEG"),
        "palette": encode(palette, "PNG"),
        "palette transparent index": encode(palette, "PNG", transparency=3),
        "palette transparent bytes": encode(palette, "PNG", transparency=bytes(range(0, 250, 5))),
        "gif": encode(palette, "GIF"),
        "grey": encode(image.convert("L"), "PNG"),
        "grey jpeg": encode(image.convert("L"), "JPEG"),
        "grey alpha": encode(image.convert("LA"), "PNG"),
        "alpha": encode(image.convert("RGBA"), "PNG"),
        "one bit": encode(image.convert("1"), "PNG"),
        "one pixel": encode(noise(1, 1, 1), "PNG"),
        "webp": encode(image, "WEBP", lossless=True),
        "bmp": encode(image, "BMP"),
    }


ODD = _odd_images()
SIXTEEN_BITS = np.array([[0, 255, 256, 300, 32768, 65535]], dtype=np.uint16)


@pytest.mark.parametrize("name", ODD)
def test_decoding_gives_pillows_rgb_pixels_as_stored(name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's about transparency in bytes
        expected = PIL.Image.open(io.BytesIO(ODD[name])).convert("RGB")
    assert_same_image(decode_image(ODD[name]), expected)
    assert image_size(ODD[name]) == expected.size


@pytest.mark.parametrize("file_format", ["PNG", "TIFF"])
def test_sixteen_bit_grey_keeps_the_upper_byte(file_format):
    data = encode(PIL.Image.fromarray(SIXTEEN_BITS), file_format)
    assert np.asarray(decode_image(data))[0, :, 0].tolist() == [0, 0, 1, 1, 128, 255]
    assert np.asarray(decode_image(data))[0, :, 2].tolist() == [0, 0, 1, 1, 128, 255]


def test_small_values_of_an_image_of_32_bits_stay_as_pillow_has_them():
    values = np.array([[0, 200, 255]], dtype=np.int32)
    image = PIL.Image.fromarray(values)
    assert image.mode == "I"
    assert_same_image(to_rgb(image), image.convert("RGB"))
    assert np.asarray(to_rgb(PIL.Image.fromarray(values * 256)))[0, :, 0].tolist() == [0, 200, 255]
    assert_same_image(decode_image(encode_image(image)), to_rgb(image))


def test_images_are_read_from_bytes_paths_and_mappings(tmp_path):
    path = tmp_path / "image.png"
    noise(3).save(path)
    data = path.read_bytes()
    for source in (data, bytearray(data), memoryview(data), path, str(path), noise(3),
                   {"bytes": data, "path": None}, {"bytes": None, "path": str(path)}, {"path": path}):  # fmt: skip
        assert_same_image(decode_image(source), noise(3))
        assert_same_image(decode_image(encode_image(source)), noise(3))


@pytest.mark.parametrize("name", ODD)
def test_original_bytes_are_kept_of_opened_images(name, tmp_path):
    path = tmp_path / "image"
    path.write_bytes(ODD[name])
    assert encode_image(PIL.Image.open(io.BytesIO(ODD[name]))) == ODD[name]
    with PIL.Image.open(path) as image:
        assert encode_image(image) == ODD[name]
        image.load()
        assert encode_image(image) == ODD[name]


def test_edits_in_place_are_not_lost(tmp_path):
    path = tmp_path / "image.jpg"
    noise(0).save(path)
    image = PIL.Image.open(path)
    image.putpixel((1, 1), (1, 2, 3))
    expected = image.copy()
    assert_same_image(decode_image(encode_image(image)), expected)


def test_images_without_a_readable_file_become_png(tmp_path):
    path = tmp_path / "image.png"
    noise(0).save(path)
    image = PIL.Image.open(path)
    image.load()
    path.write_bytes(b"something else")
    for source in (image, noise(0)):
        data = encode_image(source)
        assert data.startswith(b"\x89PNG")
        assert_same_image(decode_image(data), noise(0))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr", "HSV", "I;16"])
def test_every_mode_encodes_to_its_rgb_pixels(mode):
    image = PIL.Image.fromarray(SIXTEEN_BITS) if mode == "I;16" else noise(5).convert(mode)
    assert_same_image(decode_image(encode_image(image)), to_rgb(image))


@pytest.mark.parametrize("source", [b"", b"no image at all", b"\x89PNG\r\n\x1a\n", encode(noise(0), "PNG")[:40]])
def test_what_is_no_image_says_so(source, tmp_path):
    with pytest.raises(
        DataError, match=r"^Example 7: .*(no image that Pillow knows|cannot be decoded).*Replace the file"
    ):
        decode_image(source, "Example 7: ")
    path = tmp_path / "broken.jpg"
    path.write_bytes(source)
    with pytest.raises(DataError, match=r"^Example 7: the image file '.*broken\.jpg'"):
        decode_image(path, "Example 7: ")


def test_postscript_is_not_run(tmp_path, monkeypatch):
    def run(*arguments, **options):
        raise AssertionError("a program was started")

    monkeypatch.setattr("subprocess.Popen", run)
    data = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n0 0 8 8 rectfill\nshowpage\n%%EOF\n"
    (tmp_path / "drawing.png").write_bytes(data)
    for source in (data, tmp_path / "drawing.png", {"bytes": data, "path": None}):
        with pytest.raises(DataError, match=r"^Example 7: .*it is EPS, a program that is not run. Convert it to PNG"):
            decode_image(source, "Example 7: ")
    with pytest.raises(DataError, match=r"^Example 7: the mask cannot be decoded: it is EPS"):
        _decode_mask(data, "Example 7: ")


@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF"])
def test_truncated_images_say_so(file_format, tmp_path):
    data = encode(noise(0, 64, 64), file_format)
    path = tmp_path / "truncated"
    path.write_bytes(data[: len(data) // 2])
    for source in (data[: len(data) // 2], path):
        with pytest.raises(DataError, match=r"^Example 7: .*(cannot be decoded|no image)"):
            decode_image(source, "Example 7: ")
    if file_format not in ("TIFF", "WEBP"):  # Pillow cannot even open these
        message = r"^Example 7: the image .*truncated.*cannot be decoded"
        with PIL.Image.open(path) as image, pytest.raises(DataError, match=message):
            encode_image(image, "Example 7: ")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (None, "an image is a PIL image, encoded bytes or a path, not nothing"),
        (3.5, "not a float"),
        ({"bytes": None, "path": None}, "not nothing"),
        ("nowhere/image.png", "cannot read the image file 'nowhere/image.png': No such file or directory"),
        (PIL.Image.new("F", (2, 2)), "floating-point image has no defined range"),
        (PIL.Image.new("I", (2, 2), -1), "pixels of a 16-bit image are in 0..65535, not -1"),
    ],
)
def test_sources_that_hold_no_image_name_themselves(source, message):
    with pytest.raises(DataError, match=f"^Example 7: .*({message})"):
        decode_image(source, "Example 7: ")
