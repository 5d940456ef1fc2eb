"""`Statistics`: what was measured at every site, as plain data that is saved, loaded and merged."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from vbp.errors import InputError, one_line
from vbp.method.covariance import ChannelCovariance
from vbp.method.fisher import LogitSensitivity, SiteSensitivity
from vbp.method.moments import ChannelMoments
from vbp.runtime.decode import parse_json
from vbp.runtime.files import is_regular, write_bytes
from vbp.sites.site import Site

_FORMAT = "vbp-statistics/4"

# Version 3 has the covariance of keys about the mean of all images, not of each, so that it must be collected again.
# Older files have no digest, those of version 1 no covariances either; they are otherwise the same.
_READABLE = ("vbp-statistics/1", "vbp-statistics/2", "vbp-statistics/3", _FORMAT)
_WITHOUT_DIGEST = _READABLE[:2]

# No module name holds this sign, so no other site has these names.
QUERY, KEY = "#query", "#key"
_READING_ERRORS = (SafetensorError, LookupError, ValueError, TypeError, AttributeError, OSError, RuntimeError)
_SENSITIVITY_PARTS = ("pivot", "inputs", "outputs")
_LOGIT_PARTS = ("query", "key")


@dataclass(frozen=True)
class Statistics:
    """Moments of the value that reaches each consumer, keyed by site name.

    Attributes:
        moments: Site name -> moments of its hidden channels where the consumer reads them; of query/key channels,
            which no layer reads, `<name>#query` and `<name>#key` -> moments where they are made. For a layer that
            reads the channels beside the consumer, `<name>#read:<layer>` -> moments there.
        images: Calibration images seen.
        model: Fingerprint of the model that was observed.
        data: Fingerprint of the images and their preprocessing; empty if the caller gave none.
        covariances: The names of `moments` -> second moments of all channels of a site together, over a share of
            the tokens, those of keys about the mean of their image; empty if they were not collected.
        token_fraction: That share.
        sensitivities: Name of an MLP or value site -> how much the predictions depend on its consumer, likewise for
            other layers that read it; empty if not collected.
        logit_sensitivities: Name of a query/key site -> how much the predictions depend on its logits, likewise.

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
    logit_sensitivities: Mapping[str, LogitSensitivity] = field(default_factory=dict)

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
        if [*self.sensitivities, *self.logit_sensitivities] != [*other.sensitivities, *other.logit_sensitivities]:
            raise InputError(
                "statistics to merge must all have sensitivities of the same sites, or none, got "
                f"{len(self.sensitivities)} and {len(other.sensitivities)}; collect them again"
            )
        merged = {name: moments.merge(other.moments[name]) for name, moments in self.moments.items()}
        covariances = {name: own.merge(other.covariances[name]) for name, own in self.covariances.items()}
        sensitivities = {name: own.merge(other.sensitivities[name]) for name, own in self.sensitivities.items()}
        logits = {name: own.merge(other.logit_sensitivities[name]) for name, own in self.logit_sensitivities.items()}
        data = self.data if self.data == other.data else ""
        images = self.images + other.images
        return Statistics(merged, images, self.model, data, covariances, self.token_fraction, sensitivities, logits)

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
            InputError: A site is missing or has another number of channels, or lacks what is wanted.
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
            held = self.sensitivities if site.consumer else self.logit_sensitivities
            if sensitivity and not all(
                name in held for name in [reader.key for reader in site.readers] or [site.name]
            ):
                raise InputError(
                    f"{path} must hold the sensitivity of {site.name} for the criterion auto, got none; leave "
                    "--stats_path out to collect it, or choose another criterion"
                )

    def identity(self) -> list[Any]:
        """Return plain data that differs between two statistics of one model and the same images."""
        sums = {name: [seen.count, seen.mean.tolist(), seen.m2.tolist()] for name, seen in self.moments.items()}
        covariances = {name: float(seen.m2.sum()) for name, seen in self.covariances.items()}
        return [sums, covariances, {name: float(seen.inputs.sum()) for name, seen in self.sensitivities.items()}]

    def save(self, path: Path | str) -> None:
        """Write a safetensors file that `load` reads, whole or not at all."""
        tensors: dict[str, Tensor] = {}
        for name, moments in self.moments.items():
            tensors |= {f"{name}/mean": moments.mean, f"{name}/m2": moments.m2}
        for name, covariance in self.covariances.items():
            tensors |= {f"{name}/covariance_mean": covariance.mean, f"{name}/covariance_m2": covariance.packed()}
        for name, sums in self.sensitivities.items():
            tensors |= {f"{name}/sensitivity_{part}": getattr(sums, part) for part in _SENSITIVITY_PARTS}
        for name, pairs in self.logit_sensitivities.items():
            tensors |= {f"{name}/sensitivity_{part}": getattr(pairs, part) for part in _LOGIT_PARTS}
        header = {
            "images": self.images,
            "model": self.model,
            "data": self.data,
            "counts": {name: moments.count for name, moments in self.moments.items()},
            "covariance_counts": {name: covariance.count for name, covariance in self.covariances.items()},
            "token_fraction": self.token_fraction,
            "sensitivity_images": {name: sums.images for name, sums in self.sensitivities.items()},
            "logit_images": {name: pairs.images for name, pairs in self.logit_sensitivities.items()},
        }
        tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        text = json.dumps(header)
        metadata = {"format": _FORMAT, "header": text, "sha256": _digest(_FORMAT + text, tensors)}
        write_bytes(Path(path), save(tensors, metadata=metadata))

    @staticmethod
    def load(path: Path | str) -> Statistics:
        """Read a file that `save` wrote.

        Raises:
            InputError: The file is missing, damaged or something else.
        """
        path = Path(path)
        if not is_regular(path):
            raise InputError(f"statistics file must exist, got {path}; leave it out to collect statistics")
        try:
            with safe_open(str(path), framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no mapping)
            if metadata.get("format") not in _READABLE:
                raise InputError(
                    f"{path} must be a statistics file of format {_FORMAT}, "
                    f"got format {metadata.get('format')!r}; collect the statistics again"
                )
            if metadata["format"] not in _WITHOUT_DIGEST or "sha256" in metadata:
                _checked(
                    metadata["sha256"] == _digest(metadata["format"] + metadata["header"], tensors),
                    "its content has another digest",
                )
            statistics = _decoded(parse_json(metadata["header"]), tensors)
            return statistics if metadata["format"] == _FORMAT else _without_key_covariances(statistics)
        except InputError:
            raise
        except _READING_ERRORS as error:
            raise InputError(
                f"{path} is no readable statistics file ({one_line(error)}); delete it and collect the statistics "
                "again"
            ) from error


def _without_key_covariances(statistics: Statistics) -> Statistics:
    kept = {name: value for name, value in statistics.covariances.items() if not name.endswith(KEY)}
    return replace(statistics, covariances=kept)


def _digest(text: str, tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(text.encode())
    for name, value in sorted(tensors.items()):
        digest.update(f"{name} {value.dtype} {list(value.shape)}".encode())
        digest.update(value.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _checked(condition: bool, fault: str) -> None:
    if not condition:
        raise ValueError(fault)


def _decoded(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Statistics:
    """Return what was saved; raise ValueError for numbers that no images lead to."""
    for name, value in tensors.items():
        _checked(value.is_floating_point() and bool(value.isfinite().all()), f"{name} must hold finite numbers")

    def part(name: str, *shape: int) -> Tensor:
        _checked(
            tensors[name].shape == shape, f"{name} must have the shape {shape}, got {tuple(tensors[name].shape)}"
        )
        return tensors[name]

    moments, covariances, sensitivities = {}, {}, {}
    for name, count in header["counts"].items():
        hidden = len(tensors[f"{name}/mean"])
        moments[name] = ChannelMoments(count, part(f"{name}/mean", hidden), part(f"{name}/m2", hidden))
        _checked(bool((moments[name].m2 >= 0).all()), f"{name} must have no negative variance")
    for name, count in header.get("covariance_counts", {}).items():
        hidden = len(moments[name].mean)
        packed = part(f"{name}/covariance_m2", hidden * (hidden + 1) // 2)
        covariances[name] = ChannelCovariance.unpacked(count, part(f"{name}/covariance_mean", hidden), packed)
        _checked(bool((covariances[name].m2.diagonal() >= 0).all()), f"{name} must have no negative variance")
    for name, images in header.get("sensitivity_images", {}).items():
        hidden, out = len(moments[name].mean), len(tensors[f"{name}/sensitivity_outputs"])
        shapes = ((hidden,), (hidden + 1, hidden + 1), (out, out))
        named = [f"{name}/sensitivity_{kind}" for kind in _SENSITIVITY_PARTS]
        sensitivities[name] = SiteSensitivity(images, *map(lambda place, shape: part(place, *shape), named, shapes))
    logits = {}
    for name, images in header.get("logit_images", {}).items():
        heads, size, _ = tensors[f"{name}/sensitivity_query"].shape
        query, key = (part(f"{name}/sensitivity_{kind}", heads, size, size) for kind in _LOGIT_PARTS)
        _checked(heads * size == len(moments[name + QUERY].mean), f"{name} must have the sensitivity of its heads")
        logits[name] = LogitSensitivity(images, query, key)
    counts = [header["images"], *header["counts"].values()]
    for kind in ("covariance_counts", "sensitivity_images", "logit_images"):
        counts += header.get(kind, {}).values()
    _checked(
        all(type(count) is int and 0 < count < 2**63 for count in counts),
        "it must count at least one image and sample",
    )
    model, data, fraction = header["model"], header["data"], header.get("token_fraction", 1.0)
    _checked(isinstance(model, str) and isinstance(data, str) and 0 < fraction <= 1, "its header is damaged")
    return Statistics(moments, header["images"], model, data, covariances, fraction, sensitivities, logits)


def observed_names(site: Site) -> tuple[str, ...]:
    """Return the names under which statistics of a site are kept: of queries and keys, or of each reader."""
    if site.kind == "query_key":
        return (site.name + QUERY, site.name + KEY)
    return tuple(reader.key for reader in site.readers)
