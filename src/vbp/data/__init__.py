"""Where images come from, and the batches they are loaded in."""

from vbp.data.image_list import ImageList
from vbp.data.images import Images, Split
from vbp.data.loader import ImageLoader, make_loader
from vbp.data.sources import check_data_path, class_folders, list_images
from vbp.data.subset import balanced_order, balanced_subset

__all__ = [
    "ImageList",
    "ImageLoader",
    "Images",
    "Split",
    "balanced_order",
    "balanced_subset",
    "check_data_path",
    "class_folders",
    "list_images",
    "make_loader",
]
