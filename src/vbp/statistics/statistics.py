"""`Statistics`: what was measured at every site, as plain data that is saved, loaded and merged."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from vbp.errors import InputError
from vbp.method.covariance import ChannelCovariance
from vbp.method.fisher import SiteSensitivity
from vbp.method.moments import ChannelMoments
from vbp.runtime.files import write_bytes
from vbp.sites.site import Site

_FORMAT = "vbp-statistics/2"

# Files of version 1 hold no covariances and are otherwise the same.
_READABLE = ("vbp-statistics/1", _FORMAT)

# No module name holds this sign, so no other site has these names.
QUERY, KEY = "#query", "#key"
_SENSITIVITY_PARTS = ("pivot", "inputs", "outputs")


@dataclass(frozen=True)
class Statistics:
    """Moments of the value that reaches each consumer, keyed by site name.

    Attributes:
        moments: Site name -> moments of its hidden channels where the consumer reads them; of query/key channels,
            which no layer reads, `<name>#query` and `<name>#key` -> moments where they are made.
        images: Calibration images seen.
        model: Fingerprint of the model that was observed.
        data: Fingerprint of the images and their preprocessing; empty if the caller gave none.
        covariances: The names of `moments` -> second moments of all channels of a site together, over a share of
            the tokens; empty if they were not collected.
        token_fraction: That share.
        sensitivities: Name of an MLP site -> how much the predictions depend on its consumer; empty if not collected.

    Example:
        >>> statistics.means["blocks.0.mlp.fc1"].shape
        torch.Size([128])
    """

    moments: Mapping[str, ChannelMoments]
    images: int
    model: str
    data: str = ""
    covariances: Mapping[str, ChannelCovariance] = field(default_factory=dict)
    token_fraction: float = 1.0
    sensitivities: Mapping[str, SiteSensitivity] = field(default_factory=dict)

    @property
    def means(self) -> dict[str, Tensor]:
        """Return the mean of each channel, by site name."""
        return {name: moments.mean for name, moments in self.moments.items()}

    @property
    def variances(self) -> dict[str, Tensor]:
        """Return the unbiased variance of each channel, by site name."""
        return {name: moments.variance for name, moments in self.moments.items()}

    def merge(self, other: Statistics) -> Statistics:
        """Return the statistics of two passes of one model over disjoint images.

        Raises:
            InputError: They belong to different models or sites, or only one has covariances.
        """
        if self.model != other.model or list(self.moments) != list(other.moments):
            raise InputError(
                "statistics to merge must come from one model and the same sites, got models "
                f"{self.model[:12]} and {other.model[:12]}; collect them again"
            )
        if list(self.covariances) != list(other.covariances) or self.token_fraction != other.token_fraction:
            raise InputError(
                "statistics to merge must all have covariances of the same share of the tokens, or none, got "
                f"{len(self.covariances)} of {self.token_fraction} and {len(other.covariances)} of "
                f"{other.token_fraction}; collect them again"
            )
        if list(self.sensitivities) != list(other.sensitivities):
            raise InputError(
                "statistics to merge must all have sensitivities of the same sites, or none, got "
                f"{len(self.sensitivities)} and {len(other.sensitivities)}; collect them again"
            )
        merged = {name: moments.merge(other.moments[name]) for name, moments in self.moments.items()}
        covariances = {name: own.merge(other.covariances[name]) for name, own in self.covariances.items()}
        sensitivities = {name: own.merge(other.sensitivities[name]) for name, own in self.sensitivities.items()}
        data = self.data if self.data == other.data else ""
        images = self.images + other.images
        return Statistics(merged, images, self.model, data, covariances, self.token_fraction, sensitivities)

    def check_made_for(self, model: str, data: str, path: Path) -> None:
        """Refuse statistics of another model or other data, by their fingerprints; `path` is for the message.

        Raises:
            InputError: They were made for something else.
        """
        for what, made_for, at_hand in (("model", self.model, model), ("data", self.data, data)):
            if made_for != at_hand:
                raise InputError(
                    f"{path} must hold statistics of this {what} ({at_hand[:12]}), got those of another "
                    f"({made_for[:12]}); leave --stats_path out to collect them, or give the {what} that it was made "
                    "for (calibration images, seed and preprocessing count as data)"
                )

    def check_holds(
        self, sites: Sequence[Site], path: Path, *, covariance: bool = False, sensitivity: bool = False
    ) -> None:
        """Refuse statistics that lack a site, as those of a run without attention, or what a site needs.

        Raises:
            InputError: A site is missing, has another number of channels, or has no covariance or (an MLP) no
            sensitivity
                where that is wanted.
        """
        for site in sites:
            for name in observed_names(site):
                width = len(self.moments[name].mean) if name in self.moments else "none"
                if width != site.hidden:
                    raise InputError(
                        f"{path} must hold {site.hidden} channels of {name}, got {width}; leave --stats_path out to "
                        "collect the statistics of these sites"
                    )
                if covariance and name not in self.covariances:
                    raise InputError(
                        f"{path} must hold the covariance of {name} for the refit, got means and variances alone; "
                        "leave --stats_path out to collect it, or compensate with the mean"
                    )
            if sensitivity and site.kind == "mlp" and site.name not in self.sensitivities:
                raise InputError(
                    f"{path} must hold the sensitivity of {site.name} for the criterion auto, got none; leave "
                    "--stats_path out to collect it, or choose another criterion"
                )

    def save(self, path: Path | str) -> None:
        """Write a safetensors file that `load` reads, whole or not at all."""
        tensors: dict[str, Tensor] = {}
        for name, moments in self.moments.items():
            tensors |= {f"{name}/mean": moments.mean, f"{name}/m2": moments.m2}
        for name, covariance in self.covariances.items():
            tensors |= {f"{name}/covariance_mean": covariance.mean, f"{name}/covariance_m2": covariance.packed()}
        for name, sums in self.sensitivities.items():
            tensors |= {f"{name}/sensitivity_{part}": getattr(sums, part) for part in _SENSITIVITY_PARTS}
        header = {
            "images": self.images,
            "model": self.model,
            "data": self.data,
            "counts": {name: moments.count for name, moments in self.moments.items()},
            "covariance_counts": {name: covariance.count for name, covariance in self.covariances.items()},
            "token_fraction": self.token_fraction,
            "sensitivity_images": {name: sums.images for name, sums in self.sensitivities.items()},
        }
        tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        write_bytes(Path(path), save(tensors, metadata={"format": _FORMAT, "header": json.dumps(header)}))

    @staticmethod
    def load(path: Path | str) -> Statistics:
        """Read a file that `save` wrote.

        Raises:
            InputError: The file is missing, damaged or something else.
        """
        path = Path(path)
        if not path.is_file():
            raise InputError(f"statistics file must exist, got {path}; leave it out to collect statistics")
        try:
            with safe_open(str(path), framework="pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") not in _READABLE:
                    raise InputError(
                        f"{path} must be a statistics file of format {_FORMAT}, "
                        f"got format {metadata.get('format')!r}; collect the statistics again"
                    )
                header = json.loads(metadata["header"])
                moments = {
                    name: ChannelMoments(count, file.get_tensor(f"{name}/mean"), file.get_tensor(f"{name}/m2"))
                    for name, count in header["counts"].items()
                }
                covariances = {
                    name: ChannelCovariance.unpacked(
                        count, file.get_tensor(f"{name}/covariance_mean"), file.get_tensor(f"{name}/covariance_m2")
                    )
                    for name, count in header.get("covariance_counts", {}).items()
                }
                sensitivities = {
                    name: SiteSensitivity(
                        images, *(file.get_tensor(f"{name}/sensitivity_{part}") for part in _SENSITIVITY_PARTS)
                    )
                    for name, images in header.get("sensitivity_images", {}).items()
                }
        except (SafetensorError, KeyError, json.JSONDecodeError) as error:
            raise InputError(
                f"{path} is no readable statistics file ({error}); delete it and collect the statistics again"
            ) from error
        return Statistics(
            moments, header["images"], header["model"], header["data"], covariances,
            header.get("token_fraction", 1.0), sensitivities,
        )  # fmt: skip


def observed_names(site: Site) -> tuple[str, ...]:
    """Return the names under which statistics of a site are kept: its own, or one for queries and one for keys."""
    return (site.name + QUERY, site.name + KEY) if site.kind == "query_key" else (site.name,)
