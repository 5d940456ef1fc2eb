"""What is decoded, whatever a file is called; what is refused as unreadable; what is never opened."""

from __future__ import annotations

import io
import os
import signal
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile
from torchvision.datasets.folder import pil_loader
from torchvision.transforms.functional import to_tensor

from vbp.data.data_path import list_images
from vbp.data.folder import ImageList
from vbp.data.formats import IMAGE_EXTENSIONS, IMAGE_FORMATS, MAX_PIXELS
from vbp.data.loader import make_loader

RAMP = np.tile(np.linspace(0, 255, 32).astype(np.uint8), (24, 1))
GREY, COLOUR = Image.fromarray(RAMP), Image.fromarray(np.dstack([RAMP, RAMP[:, ::-1], RAMP.T[:24, :1] * RAMP]))


@pytest.fixture(autouse=True)
def end_what_waits() -> Iterator[None]:
    """End a test that waits for a pipe."""
    signal.signal(signal.SIGALRM, lambda *_: pytest.fail("it waits"))
    signal.alarm(60)
    yield
    signal.alarm(0)


def read(folder: Path, *names: str, **options: Any) -> tuple[list[torch.Tensor], dict[str, str]]:
    """Return the images that could be read, and why the others could not, by name."""
    images = ImageList(folder, names, (0,) * len(names))
    loader = make_loader(images, to_tensor, batch_size=1, num_workers=0, max_unreadable=1.0, **options)
    shown = [batch[0] for batch, _ in loader]
    return shown, {Path(name).name: reason for name, reason in loader.unreadable.items()}


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


GOOD: dict[str, bytes] = {
    "grey.png": encoded(GREY, "PNG"),
    "colour.jpg": encoded(COLOUR, "JPEG"),
    "colour.jpeg": encoded(COLOUR, "JPEG"),
    "colour.jpe": encoded(COLOUR, "JPEG"),
    "colour.jfif": encoded(COLOUR, "JPEG"),
    "colour.webp": encoded(COLOUR, "WEBP"),
    "colour.bmp": encoded(COLOUR, "BMP"),
    "colour.gif": encoded(COLOUR, "GIF"),
    "colour.tif": encoded(COLOUR, "TIFF"),
    "compressed.tiff": encoded(COLOUR, "TIFF", compression="tiff_lzw"),
    "colour.avif": encoded(COLOUR, "AVIF"),
    "cmyk.jpg": encoded(COLOUR.convert("CMYK"), "JPEG"),
    "one_bit.png": encoded(GREY.convert("1"), "PNG"),
    "palette.png": encoded(COLOUR.quantize(16), "PNG", transparency=3),
    "palette_bytes.png": encoded(COLOUR.quantize(16), "PNG", transparency=bytes(range(16))),
    "transparent.gif": encoded(COLOUR.quantize(16), "GIF", transparency=0),
    "animated.gif": encoded(COLOUR, "GIF", save_all=True, append_images=[GREY.convert("RGB")]),
    "animated.png": encoded(COLOUR, "PNG", save_all=True, append_images=[GREY.convert("RGB")]),
    "animated.webp": encoded(COLOUR, "WEBP", save_all=True, append_images=[GREY.convert("RGB")]),
    "two_pages.tif": encoded(GREY, "TIFF", save_all=True, append_images=[GREY]),
    "alpha.png": encoded(GREY.convert("LA"), "PNG"),
    "alpha.webp": encoded(COLOUR.convert("RGBA"), "WEBP"),
    "called_otherwise.jpg": encoded(COLOUR, "PNG"),
    **{f"turned_{number}.jpg": encoded(COLOUR, "JPEG", exif=exif(number)) for number in range(1, 9)},
}


@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
def test_the_formats_and_modes_that_are_read_give_the_stored_pixels(tmp_path: Path) -> None:
    """The oracle is torchvision's reader: colours as stored, first image of several, no turning by EXIF."""
    for name, content in GOOD.items():
        (tmp_path / name).write_bytes(content)
    shown, unreadable = read(tmp_path, *GOOD)
    assert unreadable == {}
    for name, image in zip(GOOD, shown, strict=True):
        assert torch.equal(image, to_tensor(pil_loader(str(tmp_path / name)))), name
    assert {Path(name).suffix for name in GOOD} == {*IMAGE_EXTENSIONS}


@pytest.mark.parametrize("kind", ["EPS", "JPEG2000", "PPM", "DIB", "ICO", "TGA", "PCX", "SGI", "PDF"])
def test_other_formats_are_not_decoded_whatever_a_file_is_called(tmp_path: Path, kind: str) -> None:
    (tmp_path / "a.jpg").write_bytes(encoded(COLOUR, kind))
    (tmp_path / "b.jpg").write_bytes(GOOD["colour.jpg"])
    shown, unreadable = read(tmp_path, "a.jpg", "b.jpg")
    assert len(shown) == 1
    assert (
        unreadable["a.jpg"] == f"UnidentifiedImageError: none of the formats {', '.join(IMAGE_FORMATS)}, or damaged"
    )


def test_no_program_is_started_for_an_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """EPS in a `.jpg` must not start Ghostscript: one that is there writes a file when it is called."""
    program = tmp_path / "bin/gs"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\necho called >> {tmp_path}/called\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", None)
    (tmp_path / "a.jpg").write_bytes(encoded(COLOUR, "EPS"))
    (tmp_path / "b.jpg").write_bytes(GOOD["colour.jpg"])
    assert list(read(tmp_path, "a.jpg", "b.jpg")[1]) == ["a.jpg"]
    assert not (tmp_path / "called").exists()
    with pytest.raises(OSError, match=r"EPS|script|image|file"), Image.open(tmp_path / "a.jpg") as image:
        image.load()  # Pillow itself starts it
    assert (tmp_path / "called").exists()


BAD: dict[str, bytes] = {
    "empty.jpg": b"",
    "half.jpg": GOOD["colour.jpg"][: len(GOOD["colour.jpg"]) // 2],
    "half.png": GOOD["grey.png"][: len(GOOD["grey.png"]) // 2],
    "half.webp": GOOD["colour.webp"][:30],
    "half.gif": GOOD["colour.gif"][:20],
    "half.bmp": GOOD["colour.bmp"][:40],
    "half.tif": GOOD["colour.tif"][:100],
    "half.avif": GOOD["colour.avif"][:200],
    "page.jpg": b"<html>404</html>",
    "zeros.png": bytes(5000),
    "no_size.png": GOOD["grey.png"][:16] + struct.pack(">II", 0, 0) + GOOD["grey.png"][24:],
    "float.tif": encoded(Image.fromarray(RAMP.astype(np.float32)), "TIFF"),
    "dark_16_bit.png": encoded(Image.fromarray(RAMP.astype(np.uint16)), "PNG"),
}


def test_damaged_files_are_unreadable_images(tmp_path: Path) -> None:
    for name, content in BAD.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "good.jpg").write_bytes(GOOD["colour.jpg"])
    shown, unreadable = read(tmp_path, *BAD, "good.jpg")
    assert (len(shown), set(unreadable)) == (1, set(BAD))


@pytest.mark.parametrize("error", [RuntimeError, AssertionError, ZeroDivisionError, NotImplementedError, MemoryError])
def test_whatever_a_decoder_raises_is_an_unreadable_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    (tmp_path / "a.jpg").write_bytes(GOOD["colour.jpg"])
    (tmp_path / "b.png").write_bytes(GOOD["grey.png"])

    def broken(self: ImageFile.ImageFile) -> None:
        raise error("the decoder is broken")

    monkeypatch.setattr("PIL.JpegImagePlugin.JpegImageFile.load_prepare", broken)
    shown, unreadable = read(tmp_path, "a.jpg", "b.png")
    assert (len(shown), unreadable) == (1, {"a.jpg": f"{error.__name__}: the decoder is broken"})


@pytest.mark.filterwarnings("error")
def test_the_limit_on_pixels_is_one_number_that_can_be_raised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = Image.MAX_IMAGE_PIXELS
    assert own is not None
    assert 2 * own == MAX_PIXELS
    for name, size in {"at.png": (30, 10), "above.png": (43, 7)}.items():
        Image.new("1", size).save(tmp_path / name)
    shown, unreadable = read(tmp_path, "at.png", "above.png", max_pixels=300)
    assert len(shown) == 1
    assert unreadable == {
        "above.png": "ValueError: it has more pixels than max_pixels, which is 300; raise it to read the image"
    }
    assert read(tmp_path, "at.png", "above.png", max_pixels=301)[1] == {}
    # Pillow's own limit and a program's are neither asked nor changed.
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 5)
    assert read(tmp_path, "at.png", "above.png")[1] == {}
    assert Image.MAX_IMAGE_PIXELS == 5
    # Decoders that read a file whole must not be led to read terabytes.
    with (tmp_path / "hole.webp").open("wb") as file:
        file.write(GOOD["colour.webp"])
        file.truncate(2**40)
    assert "more than the 300 pixels" in read(tmp_path, "at.png", "hole.webp", max_pixels=300)[1]["hole.webp"]


def make_pipe(path: Path) -> None:
    os.mkfifo(path)


def link_to_zeros(path: Path) -> None:
    path.symlink_to("/dev/zero")


@pytest.mark.parametrize(("make", "kind"), [(make_pipe, "a pipe"), (link_to_zeros, "a device")])
def test_pipes_and_devices_are_unreadable_images_and_never_opened(
    tmp_path: Path, make: Callable[[Path], None], kind: str
) -> None:
    folder = tmp_path / "val/ant"
    folder.mkdir(parents=True)
    (folder / "good.jpg").write_bytes(GOOD["colour.jpg"])
    make(folder / "odd.jpg")
    images = list_images(tmp_path, "val", 1)
    assert len(images) == 2
    shown, unreadable = read(tmp_path, *images.paths)
    assert (len(shown), unreadable) == (1, {"odd.jpg": f"OSError: it is {kind}, and only regular files are read"})
