"""Decoding files: crops against sizes worked out by hand, and the kinds of files that occur in data sets."""

import io
import pickle
import subprocess
import tracemalloc
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from triptych_common.data import ImageTooSmall, UnreadableImage, center_crop, decode, to_tensor

BOX, BICUBIC = Image.Resampling.BOX, Image.Resampling.BICUBIC


def noise_image(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def colour(content: bytes) -> tuple[int, int, int]:
    return decode(content, "x").getpixel((0, 0))


def test_a_square_crop_equals_its_steps_written_out():
    image = noise_image(1000, 700)
    # 700 >= 512: halved to 500 x 350; 350 < 512; 256/350 of 500 is 365.7, so 366 x 256; (366 - 256) / 2 = 55
    expected = image.resize((500, 350), BOX).resize((366, 256), BICUBIC).crop((55, 0, 311, 256))
    assert center_crop(image, 256).tobytes() == expected.tobytes()


def test_a_rectangular_crop_covers_the_target():
    image = noise_image(640, 200)
    # both sides at least twice 64 x 128 (height x width): halved once; then 64/100 of 320 is 204.8
    expected = image.resize((320, 100), BOX).resize((205, 64), BICUBIC).crop((38, 0, 166, 64))
    assert center_crop(image, (64, 128)).tobytes() == expected.tobytes()
    tall = image.transpose(Image.Transpose.ROTATE_90)
    assert center_crop(tall, (128, 64)).size == (64, 128)


def test_halving_averages_two_by_two():
    blocks = np.random.default_rng(1).integers(0, 63, (8, 8, 3)).astype(np.uint8)
    pixels = np.kron(blocks, np.ones((2, 2, 1), np.uint8)).astype(np.int64)
    pixels[::2, ::2] += 2  # values vary within each block, whose mean is an integer
    pixels[1::2, 1::2] += 2
    assert np.array_equal(np.array(center_crop(Image.fromarray(pixels.astype(np.uint8)), 8)), blocks + 1)


def test_an_image_of_the_size_is_left_alone_and_a_small_one_refused():
    image = noise_image(48, 32)
    assert center_crop(image, (32, 48)).tobytes() == image.tobytes()
    with pytest.raises(ImageTooSmall, match=r"cat.png: 48x32 pixels are fewer than the crop's 33x33 .*allow upscaling"):
        center_crop(image, 33, path="cat.png")
    assert (
        center_crop(image, 64, allow_upscale=True).tobytes()
        == image.resize((96, 64), BICUBIC).crop((16, 0, 80, 64)).tobytes()
    )
    with pytest.raises(ValueError, match="expected a height and width of at least 1"):
        center_crop(image, (0, 4))


def test_tensors_are_channels_first_and_gray_is_exact():
    image = noise_image(5, 3)
    assert np.array_equal(to_tensor(image).numpy(), np.array(image).transpose(2, 0, 1))
    red, green, blue = np.array(image).astype(np.float64).transpose(2, 0, 1)
    luma = to_tensor(image, channels=1)[0].numpy()
    assert np.abs(luma - (0.299 * red + 0.587 * green + 0.114 * blue)).max() < 0.6
    gray = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16))
    assert torch.equal(to_tensor(gray.convert("RGB"), channels=1).flatten(), torch.arange(256).byte())
    with pytest.raises(ValueError, match=r"channels 4: expected 1 .* or 3"):
        to_tensor(image, channels=4)


def test_gray_palette_and_bilevel_files_become_rgb():
    assert colour(encoded(Image.new("L", (4, 4), 77), "PNG")) == (77, 77, 77)
    assert colour(encoded(Image.new("1", (4, 4), 1), "PNG")) == (255, 255, 255)
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 10, 200, 30])
    assert colour(encoded(palette, "PNG")) == (10, 200, 30)
    assert colour(encoded(palette, "GIF", save_all=True, append_images=[Image.new("P", (4, 4), 0)])) == (10, 200, 30)


def test_transparency_is_laid_over_white():
    assert colour(encoded(Image.new("RGBA", (4, 4), (200, 0, 0, 0)), "PNG")) == (255, 255, 255)
    assert colour(encoded(Image.new("RGBA", (4, 4), (200, 0, 0, 255)), "PNG")) == (200, 0, 0)
    half = colour(encoded(Image.new("RGBA", (4, 4), (200, 0, 0, 51)), "PNG"))  # 51/255 = 1/5
    assert np.abs(np.array(half) - (244, 204, 204)).max() <= 1
    assert colour(encoded(Image.new("LA", (4, 4), (0, 0)), "PNG")) == (255, 255, 255)
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 10, 200, 30])
    assert colour(encoded(palette, "PNG", transparency=1)) == (255, 255, 255)
    assert colour(encoded(Image.new("RGB", (4, 4), (1, 2, 3)), "PNG", transparency=(1, 2, 3))) == (255, 255, 255)


def test_cmyk_is_converted():
    red = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    assert colour(encoded(red, "TIFF")) == (255, 0, 0)
    assert np.abs(np.array(colour(encoded(red, "JPEG", quality=100))) - (255, 0, 0)).max() <= 4


def test_sixteen_bit_gray_keeps_its_high_byte():
    values = np.array([[0, 255, 256, 77 * 256 + 255, 65535]], np.uint16)
    content = encoded(Image.fromarray(values), "PNG")
    assert to_tensor(decode(content, "x"))[0].tolist() == [[0, 0, 1, 77, 255]]
    seen = decode(encoded(Image.fromarray(values), "PNG", transparency=256), "x")
    assert to_tensor(seen)[2].tolist() == [[0, 0, 255, 77, 255]]


def test_pixels_without_a_defined_white_are_refused():
    for pixels in (np.full((4, 4), 0.5, np.float32), np.full((4, 4), 1 << 20, np.int32), np.full((4, 4), -1, np.int32)):
        with pytest.raises(UnreadableImage, match=r"scan.tif: .* no defined white; save it with 8 or 16 bits"):
            decode(encoded(Image.fromarray(pixels), "TIFF"), "scan.tif")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_the_orientation_tag_is_applied(kind):
    image = Image.new("RGB", (32, 16), "white")
    image.paste("black", (0, 0, 16, 16))  # left half
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: the file's left is the picture's top
    upright = decode(encoded(image, kind, exif=exif.tobytes()), "x").convert("L")
    assert upright.size == (16, 32)
    assert upright.getpixel((8, 4)) < 8
    assert upright.getpixel((8, 28)) > 247


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data", "ignore:Truncated File Read")
@pytest.mark.parametrize(
    ("kind", "options"),
    [("JPEG", {}), ("JPEG", {"progressive": True}), ("PNG", {}), ("WEBP", {}), ("BMP", {}), ("GIF", {}), ("TIFF", {})],
)
def test_no_truncated_file_passes_for_a_whole_one(kind, options):
    content = encoded(noise_image(13, 9), kind, **options)
    whole, errors = decode(content, "x").tobytes(), []
    for length in range(len(content)):
        try:
            assert decode(content[:length], "broken.img").tobytes() == whole  # only the trailer is missing
        except UnreadableImage as error:
            errors.append(str(error))
    assert len(errors) > 0.9 * len(content)
    assert all(error.startswith("broken.img: ") and "\n" not in error for error in errors)


def test_junk_is_refused():
    with pytest.raises(UnreadableImage, match=r"^a.png: not an image in a known format \(PNG, .*\), or cut short$"):
        decode(b"<html>404</html>", "a.png")
    with pytest.raises(UnreadableImage, match=r"^a.png: the file is empty$"):
        decode(b"", "a.png")


def test_the_error_survives_the_way_out_of_a_worker():
    error = pickle.loads(pickle.dumps(ImageTooSmall("a.png", "too small")))
    assert (type(error), error.path, error.reason, str(error)) == (
        ImageTooSmall,
        "a.png",
        "too small",
        "a.png: too small",
    )


def test_no_program_is_started_for_a_format_that_needs_one(monkeypatch):
    """Pillow hands an EPS file to Ghostscript, whatever the file is called."""
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("a program was started"))
    with pytest.raises(UnreadableImage, match="not an image in a known format"):
        decode(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n", "b.png")


def png_header(width: int, height: int) -> bytes:
    """The beginning of a PNG of a given size, made from that of a small one."""
    file = io.BytesIO()
    Image.new("RGB", (1, 1)).save(file, "png")
    content = bytearray(file.getvalue())
    content[16:24] = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    return bytes(content)


@pytest.mark.parametrize(("size", "complaint"), [
    ((89_000_000, 1), "89000000x1 pixels: a side above 32,768; cut it into parts"),
    ((13_000, 13_000), "13000x13000 pixels: above 64 megapixels; reduce it, or set TRIPTYCH_MAX_MEGAPIXELS=169"),
])  # fmt: skip
def test_size_is_bounded_before_pixels_are_decoded(size, complaint):
    tracemalloc.start()
    with pytest.raises(UnreadableImage, match=f"^a.png: {complaint}$"):
        decode(png_header(*size), "a.png")
    assert tracemalloc.get_traced_memory()[1] < 1e6
    tracemalloc.stop()


def test_the_bound_can_be_moved(monkeypatch):
    monkeypatch.setenv("TRIPTYCH_MAX_MEGAPIXELS", "0.0001")
    with pytest.raises(UnreadableImage, match=r"20x20 pixels: above 0.0001 megapixels"):
        decode(png_header(20, 20), "a.png")
    monkeypatch.setenv("TRIPTYCH_MAX_MEGAPIXELS", "many")
    with pytest.raises(UnreadableImage, match=r"TRIPTYCH_MAX_MEGAPIXELS='many': expected a number"):
        decode(png_header(20, 20), "a.png")
