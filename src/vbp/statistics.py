"""Collect the statistics of every site in one pass over the calibration images."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from vbp.covariance import ChannelCovariance, CovarianceSum
from vbp.errors import InputError
from vbp.files import write_bytes
from vbp.fingerprints import model_fingerprint
from vbp.modes import evaluation_mode, frozen
from vbp.moments import ChannelMoments
from vbp.observers import Observer
from vbp.outputs import logits_of
from vbp.sampling import TokenSample, TokenSampler
from vbp.sensing import Draws, SensitivitySums
from vbp.sensitivity import SiteSensitivity
from vbp.sites import Site

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
        sensitivities: Name of an MLP site -> how much the answers depend on its consumer; empty if not collected.
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
        """Give the mean of each channel, by site name."""
        return {name: moments.mean for name, moments in self.moments.items()}

    @property
    def variances(self) -> dict[str, Tensor]:
        """Give the unbiased variance of each channel, by site name."""
        return {name: moments.variance for name, moments in self.moments.items()}

    def merge(self, other: Statistics) -> Statistics:
        """Give the statistics of two passes of one model over disjoint images.

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
        covariances = {name: found.merge(other.covariances[name]) for name, found in self.covariances.items()}
        sensitivities = {name: found.merge(other.sensitivities[name]) for name, found in self.sensitivities.items()}
        data = self.data if self.data == other.data else ""
        images = self.images + other.images
        return Statistics(merged, images, self.model, data, covariances, self.token_fraction, sensitivities)

    def check_made_for(self, model: str, data: str, path: Path) -> None:
        """Refuse statistics of another model or other data.

        Args:
            model: Fingerprint of the model at hand.
            data: Fingerprint of the images at hand and their preprocessing.
            path: Where they were read, for the message.

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
        """Refuse statistics that lack a site, such as those of a run without attention.

        Args:
            sites: What will be pruned.
            path: Where they were read, for the message.
            covariance: Refuse them also if they lack a site's covariance, as those of a run without refit do.
            sensitivity: Refuse them also if they lack an MLP site's sensitivity.

        Raises:
            InputError: A site is missing, or has another number of channels.
        """
        for site in sites:
            for name in observed_names(site):
                found = len(self.moments[name].mean) if name in self.moments else "none"
                if found != site.hidden:
                    raise InputError(
                        f"{path} must hold {site.hidden} channels of {name}, got {found}; leave --stats_path out to "
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
        tensors = {}
        for name, moments in self.moments.items():
            tensors[f"{name}/mean"] = moments.mean.cpu().contiguous()
            tensors[f"{name}/m2"] = moments.m2.cpu().contiguous()
        for name, found in self.covariances.items():
            tensors[f"{name}/covariance_mean"] = found.mean.cpu().contiguous()
            tensors[f"{name}/covariance_m2"] = found.packed().cpu()
        for name, seen in self.sensitivities.items():
            tensors[f"{name}/sensitivity_pivot"] = seen.pivot.cpu().contiguous()
            tensors[f"{name}/sensitivity_inputs"] = seen.inputs.cpu().contiguous()
            tensors[f"{name}/sensitivity_outputs"] = seen.outputs.cpu().contiguous()
        header = {
            "images": self.images,
            "model": self.model,
            "data": self.data,
            "counts": {name: moments.count for name, moments in self.moments.items()},
            "covariance_counts": {name: found.count for name, found in self.covariances.items()},
            "token_fraction": self.token_fraction,
            "sensitivity_images": {name: seen.images for name, seen in self.sensitivities.items()},
        }
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
    """Give the names under which statistics of a site are kept: its own, or one for queries and one for keys."""
    return (site.name + QUERY, site.name + KEY) if site.kind == "query_key" else (site.name,)


@contextmanager
def _observing(
    model: nn.Module, sites: Sequence[Site], sampler: TokenSampler | None, sums: SensitivitySums | None
) -> Iterator[dict[str, Observer]]:
    observers = {name: Observer(sampler) for site in sites for name in observed_names(site)}
    handles = []
    for site in sites:
        if site.kind == "query_key":
            for name, (layer, first) in zip(observed_names(site), site.rows, strict=True):
                handles.append(observers[name].watch_output(model.get_submodule(layer), first, site.hidden))
        else:
            handles.append(observers[site.name].watch_input(model.get_submodule(site.consumer)))
    try:
        if sums is not None:
            handles += sums.watch(model)
        # Gradients are wanted of the layers' outputs alone, also where the caller has frozen the model.
        with evaluation_mode(model), frozen(model), torch.set_grad_enabled(sums is not None):
            yield observers
    finally:
        for handle in handles:
            handle.remove()


def _show(model: nn.Module, pixels: Tensor, sums: SensitivitySums | None, observers: Collection[Observer]) -> None:
    if sums is None:
        model(pixels)
        return
    logits = logits_of(model(pixels.requires_grad_()))
    # Gradient checkpointing runs layers again in the backward pass: nothing must be seen twice.
    for observer in observers:
        observer.paused = True
    sums.see(logits)
    for observer in observers:
        observer.paused = False


def collect_statistics(
    model: nn.Module,
    sites: Sequence[Site],
    batches: Iterable[Any],
    *,
    device: torch.device | str | None = None,
    data: str = "",
    covariance: bool = False,
    tokens: TokenSample | None = None,
    sensitivity: Draws | None = None,
    pivots: Mapping[str, Tensor] | None = None,
) -> Statistics:
    """Observe what reaches each site's consumer over all batches, in evaluation mode.

    Args:
        model: The dense model; left as it was.
        sites: From `find_sites`.
        batches: Image tensors "batch channels height width", or tuples that begin with one (labels are not read).
        device: Where the images go; by default where the model is.
        data: Fingerprint of the images, kept so that a saved file is not used for other data.
        covariance: Also collect the covariance of the channels of each site, for the refit. It takes
            `covariance_bytes` on the device, and with all tokens about as much time as the model itself.
        tokens: The tokens that count for the covariance; by default all. Means and variances are of all tokens.
        sensitivity: Also collect the sensitivity of each MLP site, with these random numbers; by default not. It
            takes a backward pass, with the activations of a batch in memory, and `sensitivity_bytes` on the device.
        pivots: Site name -> what the channels of the sensitivity are counted from, near their means; by default the
            mean of the first batch. Passes that are merged give what one would only if they have the same.

    Raises:
        InputError: No image came, a site saw a value that is not finite, or it has no sensitivity.
    """
    target = torch.device(device) if device is not None else next(model.parameters()).device
    sample = TokenSample() if tokens is None else tokens
    sampler = TokenSampler(sample) if covariance else None
    sums = None if sensitivity is None else SensitivitySums(sites, sensitivity, pivots)
    images = 0
    with _observing(model, sites, sampler, sums) as observers:
        for batch in batches:
            pixels = batch if isinstance(batch, Tensor) else batch[0]
            if sampler is not None:
                sampler.begin(pixels.shape[0])
            _show(model, pixels.detach().to(target, non_blocking=True), sums, observers.values())
            images += pixels.shape[0]
    if images == 0:
        raise InputError("calibration needs at least one image, got none; check the training images")
    moments = {name: _finite(name, observer.moments) for name, observer in observers.items()}
    covariances = {}
    for name, observer in observers.items():
        if observer.covariance is not None:
            covariances[name] = _finite_covariance(name, observer.covariance)
    fraction = sample.fraction if covariance else 1.0
    found = {} if sums is None else sums.take()
    return Statistics(moments, images, model_fingerprint(model), data, covariances, fraction, found)


def _finite(name: str, moments: ChannelMoments | None) -> ChannelMoments:
    if moments is None:
        raise InputError(f"site {name} was never run during calibration; it cannot be pruned from statistics")
    found = moments.to("cpu")
    _check_finite(name, found.mean.isfinite() & found.m2.isfinite())
    return found


def _finite_covariance(name: str, running: CovarianceSum) -> ChannelCovariance:
    taken = running.take()
    assert taken is not None
    found = taken.to("cpu")
    # Products of large values overflow before the values themselves do.
    _check_finite(name, found.m2.isfinite().all(0))
    return found


def _check_finite(name: str, channels: Tensor) -> None:
    if bad := int((~channels).sum()):
        raise InputError(
            f"activations at site {name} must be finite, got NaN or infinity in {bad} channels during "
            "calibration; check the weights and the preprocessing, or run in float32"
        )
