"""From a path to batches of prepared images."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vbp.runtime.lazy import lazy_names

if TYPE_CHECKING:
    from vbp.data.data_path import list_images as list_images
    from vbp.data.folder import ImageList as ImageList
    from vbp.data.images import balanced_subset as balanced_subset
    from vbp.data.loader import ImageLoader as ImageLoader
    from vbp.data.loader import make_loader as make_loader
else:  # a type checker would take any name for one of these
    __getattr__, __dir__ = lazy_names(__name__, __file__)
