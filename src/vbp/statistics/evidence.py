"""What criteria and compensations must know of a job's model, read from its calibration images."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal

from torch import Tensor, nn

from vbp.data.images import balanced_order
from vbp.data.loader import ImageLoader, make_loader
from vbp.data.preprocessing import evaluation_transform
from vbp.method.covariance import covariance_bytes
from vbp.method.fisher import sensitivity_bytes
from vbp.method.ridge import RIDGE
from vbp.method.sampling import Draws, TokenSample
from vbp.runtime.memory import out_of_memory
from vbp.runtime.session import bar
from vbp.sites.layers import output_channels
from vbp.statistics.collect import collect_statistics
from vbp.statistics.gradients import GradientSum
from vbp.statistics.images import calibration_share, draws_of, share_of, views_of
from vbp.statistics.mlp_samples import HiddenSamples
from vbp.statistics.statistics import Statistics, observed_names

if TYPE_CHECKING:
    from vbp.recipes.setup import Job


_log = logging.getLogger(__name__)


# What has to be collected from calibration images: moments, also covariance or sensitivity, gradients with labels.
Need = Literal["statistics", "covariance", "sensitivity", "gradients"]


@dataclass(frozen=True)
class Evidence:
    """What is known of a dense model.

    Attributes:
        statistics: With covariances and sensitivities where a criterion or the refit needs them.
        gradients: From `collect_gradients`.
        seed: Of the random criterion.
        ridge: As in the refit that will follow.
    """

    statistics: Statistics | None = None
    gradients: Mapping[str, Tensor] | None = None
    seed: int = 0
    ridge: float = RIDGE


# What comes from observing the model, and is kept in `Statistics`.
FROM_STATISTICS: Final[frozenset[Need]] = frozenset({"statistics", "covariance", "sensitivity"})


# Enough for a point near the channels' means; every process reads them.
_PIVOT_IMAGES = 32


# Images that go forward and backward at a time: what a batch leaves in memory for the backward pass is a hundred
# megabytes an image on a ViT-Base.
_CPU_SENSED, _GPU_SENSED = 16, 64


class EvidenceReader:
    """Reads calibration images part by part, each once for all that is needed of it.

    The images stand in the order of `balanced_order`. Random draws belong to an image's place in it, so that any
    number of processes and of parts, once merged, gives what one pass over all images would; an image that cannot be
    read leaves its numbers to the next one.
    """

    def __init__(self, job: Job, needs: Collection[Need], *, covariance_tokens: float = 1.0) -> None:
        """Return what the sums will take, and read nothing.

        Args:
            job: Whose images are read, and whose model is observed.
            needs: What to collect.
            covariance_tokens: Share of the tokens of each image that count for the covariance.
        """
        self._job, self._needs, self._tokens = job, frozenset(needs), covariance_tokens
        self._order = balanced_order(job.calibration, job.config.seed)
        self._gradients = GradientSum(job.model, job.sites, job.device) if "gradients" in needs else None
        self._pivots: Mapping[str, Tensor] | None = None
        for need, size in evidence_bytes(job, needs).items():
            _log.info("calibration: %s of %d sites, %.0f MB on %s", need, len(job.sites), size / 1e6, job.device)

    def read(self, part: range) -> Statistics | None:
        """Take in this process's share of the images at these places.

        All processes call it with the same parts, each part after the one before it.

        Args:
            part: Places in the order, without gaps.

        Returns:
            Statistics of the share, for `merge_across`; None if none are needed or the share is empty. Gradients are
            kept until `gradients` is called.

        Raises:
            InputError: Images cannot be read, or the model's answers are not finite.
        """
        with out_of_memory("calibration"):
            if "sensitivity" in self._needs and self._pivots is None:
                self._pivots = self._read_pivots()
            loader = self._loader(part)
            if loader is None:
                return None
            seen: Iterable[tuple[Tensor, Tensor]] = bar(self._job, loader, "calibration")
            if self._gradients is not None:
                seen = self._gradients.tee(seen)
            if self._needs & FROM_STATISTICS:
                return self._collect(seen, part)
            for _ in seen:
                pass
        return None

    def gradients(self) -> Mapping[str, Tensor] | None:
        """Return the mean gradients over what all processes have read, which all call this; None if not needed.

        Raises:
            InputError: No image was read, or a gradient is not finite.
        """
        return None if self._gradients is None else self._gradients.mean(self._job.processes)

    def _collect(self, seen: Iterable[tuple[Tensor, Tensor]], part: range) -> Statistics:
        job, processes, block = self._job, self._job.processes, self._job.config.val_batch_size
        # Batch b of the part is that of process b mod world.
        numbers = {
            "seed": job.config.seed,
            "first": part.start + processes.rank * block,
            "step": processes.world * block,
            "block": block,
        }
        sensitivity = "sensitivity" in self._needs
        if sensitivity:
            seen = _in_pieces(seen, _sensed(job))
        with job.precision.autocast():
            return collect_statistics(
                job.model,
                job.sites,
                seen,
                device=job.device,
                data=job.data,
                covariance="covariance" in self._needs,
                tokens=TokenSample(self._tokens, **numbers),
                sensitivity=Draws(**numbers) if sensitivity else None,
                pivots=self._pivots,
            )

    def _read_pivots(self) -> Mapping[str, Tensor]:
        """Return the means over the same first images on every process."""
        job = self._job
        loader = make_loader(
            job.calibration.select(list(self._order[:_PIVOT_IMAGES])),
            evaluation_transform(job.classifier.preprocessing),
            batch_size=_PIVOT_IMAGES,
            num_workers=0,
            # How many are too many is for the reading itself to say.
            max_unreadable=1.0,
        )
        with job.precision.autocast():
            return collect_statistics(job.model, job.sites, loader, device=job.device).means

    def _loader(self, part: range) -> ImageLoader | None:
        return share_of(self._job, [self._order[place] for place in part], self._job.config.val_batch_size)


def evidence_bytes(job: Job, needs: Collection[Need]) -> dict[Need, int]:
    """Return what the sums of covariances and sensitivities take, in bytes: on the device, and at most in a file."""
    found: dict[Need, int] = {}
    if "covariance" in needs:
        found["covariance"] = covariance_bytes([site.hidden for site in job.sites for _ in observed_names(site)])
    if "sensitivity" in needs:
        consumers = {site: job.model.get_submodule(site.consumer) for site in job.sites if site.kind == "mlp"}
        found["sensitivity"] = sensitivity_bytes(
            [(site.hidden, output_channels(consumer)) for site, consumer in consumers.items()]
        )
    return found


def check_given(job: Job, needs: Collection[Need]) -> None:
    """Refuse statistics from a file that lack what is needed.

    Raises:
        InputError: They do.
    """
    if job.given is not None and job.config.stats_path is not None:
        job.given.check_holds(
            job.sites,
            job.config.stats_path,
            covariance="covariance" in needs,
            sensitivity="sensitivity" in needs,
        )


def hidden_samples(job: Job, dense: nn.Module, images: range) -> HiddenSamples:
    """Sample what the dense model's MLPs read and give on some calibration images; all processes call it.

    Args:
        job: Whose images these are.
        dense: The dense model.
        images: Their places in the order of `balanced_order`.

    Raises:
        InputError: No image can be read, or there is no MLP whose hidden layer can be refitted.
    """
    loader = calibration_share(job, images, views_of(job))
    seen: Iterable[tuple[Tensor, Tensor]] = () if loader is None else bar(job, loader, "hidden layers")
    with out_of_memory("calibration"):
        samples = HiddenSamples(
            dense, job.sites, job.example, (pixels for pixels, _ in _in_pieces(seen, _sensed(job))),
            draws=draws_of(job, loader), precision=job.precision, processes=job.processes,
        )  # fmt: skip
    _log.info("hidden layers: samples of %d MLPs, %.0f MB on the host", len(samples.mlps), samples.nbytes / 1e6)
    return samples


def _sensed(job: Job) -> int:
    return _CPU_SENSED if job.device.type == "cpu" else _GPU_SENSED


def _in_pieces(batches: Iterable[tuple[Tensor, Tensor]], size: int) -> Iterator[tuple[Tensor, Tensor]]:
    for pixels, labels in batches:
        for start in range(0, len(pixels), size):
            yield pixels[start : start + size], labels[start : start + size]
