"""Which files are images: their extensions, the formats that are decoded, and how large they may be."""

from __future__ import annotations

from typing import Final

# What counts as an image in folders and shards, in either case.
IMAGE_EXTENSIONS: Final = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".avif"),
)

# Pillow's names of the formats that are decoded, whatever a file is called. Its other decoders, some of which start
# a program (EPS), see no file.
IMAGE_FORMATS: Final = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "AVIF")

# Twice the number from which on Pillow warns: the largest image that it decodes unless told otherwise.
MAX_PIXELS: Final = 178_956_970
