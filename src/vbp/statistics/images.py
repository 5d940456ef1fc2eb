"""Which calibration images this process reads, and in which views."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vbp.data.images import balanced_order
from vbp.data.loader import ImageLoader, make_loader
from vbp.data.preprocessing import Transform, ViewTransform, evaluation_transform
from vbp.method.sampling import Draws

if TYPE_CHECKING:
    from vbp.recipes.setup import Job


# Views of an image for the refits after surgery, where these take seconds. On a CPU they would take a quarter of an
# hour a plan on DeiT-tiny.
_GPU_VIEWS = 4


# Least share of the image in a view: those by which networks are trained may show next to nothing.
_LEAST_CROP = 0.35


def draws_of(job: Job, share: ImageLoader | None) -> Draws:
    """Return the random numbers of the images of this process's share: as if one process read them all."""
    size, rank, world = 1 if share is None else share.batch_size, job.processes.rank, job.processes.world
    # Batch b is that of process b mod world.
    return Draws(seed=job.config.seed, first=rank * size, step=world * size, block=size)


def views_of(job: Job) -> int:
    """Return how many views of each image the refits after surgery read."""
    views = job.config.refit_views
    if views == "auto":
        return 1 if job.device.type == "cpu" else _GPU_VIEWS
    return views


def calibration_share(job: Job, images: range, views: int = 1) -> ImageLoader | None:
    """Load this process's share of some calibration images.

    Args:
        job: Whose images these are.
        images: Their places in the order of `balanced_order`, for all processes; those beyond the last are left out.
        views: Of each image, one after the other, the same ones whenever they are loaded; they count as images.

    Returns:
        Small batches, so that every process has one; None if there are fewer images than processes.
    """
    order = balanced_order(job.calibration, job.config.seed)[images.start : images.stop]
    places = [place for place in order for _ in range(views)]
    size = min(job.config.val_batch_size, -(-len(places) // job.processes.world))
    return share_of(job, places, size, None if views == 1 else _views(job, views))


def _views(job: Job, views: int) -> Transform:
    low, high = job.config.crop_scale
    scale = (min(max(low, _LEAST_CROP), high), high)
    return ViewTransform(job.classifier.preprocessing, views, hflip=job.config.hflip, scale=scale)


def share_of(job: Job, places: list[int], batch_size: int, transform: Transform | None = None) -> ImageLoader | None:
    """Load this process's share of some calibration images, as for evaluation by default; None if it has none."""
    loader = make_loader(
        job.calibration.select(places),
        transform or evaluation_transform(job.classifier.preprocessing),
        batch_size=batch_size,
        seed=job.config.seed,
        rank=job.processes.rank,
        world=job.processes.world,
        num_workers=job.config.num_workers,
        prefetch=job.config.prefetch,
        pin_memory=True,
    )
    return loader if len(loader) else None
