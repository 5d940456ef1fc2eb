"""What criteria and compensations must know of a job's model, read from calibration images."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from torch import Tensor, nn

from vbp.method.covariance import covariance_bytes
from vbp.method.fisher import sensitivity_bytes
from vbp.method.ridge import RIDGE
from vbp.method.sampling import RandomProbes, TokenSample
from vbp.runtime.fingerprints import json_fingerprint
from vbp.runtime.memory import out_of_memory
from vbp.sites.layers import output_channels
from vbp.sites.site import Site
from vbp.statistics.batches import pixels_of
from vbp.statistics.collect import collect_statistics
from vbp.statistics.gradients import GradientSum
from vbp.statistics.images import ImageSource, in_pieces
from vbp.statistics.objective import SCALE_IMAGES, Objective
from vbp.statistics.statistics import Statistics, observed_names

_log = logging.getLogger(__name__)

# What has to be collected from calibration images: moments, also covariance or sensitivity, gradients with labels.
Need = Literal["statistics", "covariance", "sensitivity", "gradients"]


@dataclass(frozen=True)
class Evidence:
    """Hold what is known of a dense model: statistics with what a criterion or the refit needs, gradients by weight.

    `seed` is that of the random criterion, `ridge` that of the refit that will follow.
    """

    statistics: Statistics | None = None
    gradients: Mapping[str, Tensor] | None = None
    seed: int = 0
    ridge: float = RIDGE


# What comes from observing the model, and is kept in `Statistics`.
FROM_STATISTICS: Final[frozenset[Need]] = frozenset({"statistics", "covariance", "sensitivity"})

# Enough for a point near the channels' means; every process reads them.
_PIVOT_IMAGES = 32


class EvidenceReader:
    """Read calibration images part by part, each once for all that is needed of it.

    Random numbers belong to an image's place in the order, so that any number of processes and of parts, once merged,
    has what one pass over all images would; an image that cannot be read leaves its numbers to the next one.
    """

    def __init__(
        self,
        model: nn.Module,
        sites: Sequence[Site],
        images: ImageSource,
        needs: Collection[Need],
        *,
        covariance_tokens: float = 1.0,
        objective: Objective | None = None,
    ) -> None:
        """Log what the sums will take, and read nothing; `covariance_tokens` is the share of each image's tokens.

        Sensitivities are of the objective, by default of the one that the model's output for the first images says.
        """
        self._model, self._sites, self._images, self._session = model, sites, images, images.session
        self._needs, self._tokens = frozenset(needs), covariance_tokens
        self._gradients = GradientSum(model, sites, self._session.device) if "gradients" in needs else None
        self._pivots: Mapping[str, Tensor] | None = None
        self._objective = objective
        for need, size in evidence_bytes(model, sites, needs).items():
            _log.info(
                "calibration: %s of %d sites, %.0f MB on %s", need, len(sites), size / 1e6, self._session.device
            )

    def read(self, part: range) -> Statistics | None:
        """Take in this process's share of the images at these places, without gaps.

        All processes call it with the same parts, each part after the one before it.

        Returns:
            Statistics of the share, for `merge_across`; None if none are needed or the share is empty. Gradients are
            kept until `gradients` is called.

        Raises:
            InputError: Images cannot be read, or the model's predictions are not finite.
        """
        with out_of_memory("calibration"):
            if "sensitivity" in self._needs and self._pivots is None:
                self._pivots = self._read_pivots()
                self._objective = self._objective or Objective.of(self._model, self._images.first(SCALE_IMAGES))
            seen = self._images.parts(part, "calibration", labels=self._gradients is not None)
            if seen is None:
                return None
            if self._gradients is not None:
                seen = self._gradients.tee(seen)
            if self._needs & FROM_STATISTICS:
                return self._collect(map(pixels_of, seen), part)
            for _ in seen:
                pass
        return None

    def gradients(self) -> Mapping[str, Tensor] | None:
        """Return the mean gradients over what all processes have read, which all call this; None if not needed.

        Raises:
            InputError: No image was read, or a gradient is not finite.
        """
        return None if self._gradients is None else self._gradients.mean(self._session.processes)

    def _collect(self, pixels: Iterable[Tensor], part: range) -> Statistics:
        processes, block = self._session.processes, self._images.batch_size
        # Batch b of the part is that of process b mod world.
        numbers = {
            "seed": self._images.seed,
            "first": part.start * self._images.views + processes.rank * block,
            "step": processes.world * block,
            "block": block,
        }
        sensitivity = "sensitivity" in self._needs
        with self._session.precision.autocast():
            return collect_statistics(
                self._model,
                self._sites,
                in_pieces(pixels, self._session.device) if sensitivity else pixels,
                device=self._session.device,
                data=data_fingerprint(self._images, self._objective),
                covariance="covariance" in self._needs,
                tokens=TokenSample(self._tokens, **numbers),
                sensitivity=RandomProbes(**numbers) if sensitivity else None,
                pivots=self._pivots,
                objective=self._objective,
            )

    def _read_pivots(self) -> Mapping[str, Tensor]:
        """Return the means over the same first images on every process."""
        images = self._images.first(_PIVOT_IMAGES)
        with self._session.precision.autocast():
            return collect_statistics(self._model, self._sites, images, device=self._session.device).means


def data_fingerprint(images: ImageSource, objective: Objective | None) -> str:
    """Return the fingerprint of images, and of what is preserved where that is something else than logits."""
    other = "" if objective is None else objective.fingerprint
    return json_fingerprint([images.fingerprint, other]) if other and images.fingerprint else images.fingerprint


def evidence_bytes(model: nn.Module, sites: Sequence[Site], needs: Collection[Need]) -> dict[Need, int]:
    """Return what the sums of covariances and sensitivities take, in bytes: on the device, and at most in a file."""
    sizes: dict[Need, int] = {}
    if "covariance" in needs:
        sizes["covariance"] = covariance_bytes([site.hidden for site in sites for _ in observed_names(site)])
    if "sensitivity" in needs:
        read = [(site.hidden, model.get_submodule(reader.layer)) for site in sites for reader in site.readers]
        sizes["sensitivity"] = sensitivity_bytes([(hidden, output_channels(layer)) for hidden, layer in read])
    return sizes
