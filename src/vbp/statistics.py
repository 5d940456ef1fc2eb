"""Collect the statistics of every site in one pass over the calibration images."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from vbp.errors import InputError
from vbp.files import write_bytes
from vbp.fingerprints import model_fingerprint
from vbp.modes import evaluation_mode
from vbp.moments import ChannelMoments, channel_moments
from vbp.sites import Site
from vbp.tracing import channel_dim

_FORMAT = "vbp-statistics/1"
# No module name holds this sign, so no other site has these names.
QUERY, KEY = "#query", "#key"


@dataclass(frozen=True)
class Statistics:
    """Moments of the value that reaches each consumer, keyed by site name.

    Attributes:
        moments: Site name -> moments of its hidden channels where the consumer reads them; of query/key channels,
            which no layer reads, `<name>#query` and `<name>#key` -> moments where they are made.
        images: Calibration images seen.
        model: Fingerprint of the model that was observed.
        data: Fingerprint of the images and their preprocessing; empty if the caller gave none.
    """

    moments: Mapping[str, ChannelMoments]
    images: int
    model: str
    data: str = ""

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
            InputError: They belong to different models or sites.
        """
        if self.model != other.model or list(self.moments) != list(other.moments):
            raise InputError(
                "statistics to merge must come from one model and the same sites, got models "
                f"{self.model[:12]} and {other.model[:12]}; collect them again"
            )
        merged = {name: moments.merge(other.moments[name]) for name, moments in self.moments.items()}
        data = self.data if self.data == other.data else ""
        return Statistics(merged, self.images + other.images, self.model, data)

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

    def check_holds(self, sites: Sequence[Site], path: Path) -> None:
        """Refuse statistics that lack a site, such as those of a run without attention.

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

    def save(self, path: Path) -> None:
        """Write a safetensors file that `load` reads, whole or not at all."""
        tensors = {}
        for name, moments in self.moments.items():
            tensors[f"{name}/mean"] = moments.mean.cpu().contiguous()
            tensors[f"{name}/m2"] = moments.m2.cpu().contiguous()
        header = {
            "images": self.images,
            "model": self.model,
            "data": self.data,
            "counts": {name: moments.count for name, moments in self.moments.items()},
        }
        write_bytes(path, save(tensors, metadata={"format": _FORMAT, "header": json.dumps(header)}))

    @staticmethod
    def load(path: Path) -> Statistics:
        """Read a file that `save` wrote.

        Raises:
            InputError: The file is missing, damaged or something else.
        """
        if not path.is_file():
            raise InputError(f"statistics file must exist, got {path}; leave it out to collect statistics")
        try:
            with safe_open(str(path), framework="pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != _FORMAT:
                    raise InputError(
                        f"{path} must be a statistics file of format {_FORMAT}, "
                        f"got format {metadata.get('format')!r}; collect the statistics again"
                    )
                header = json.loads(metadata["header"])
                moments = {
                    name: ChannelMoments(count, file.get_tensor(f"{name}/mean"), file.get_tensor(f"{name}/m2"))
                    for name, count in header["counts"].items()
                }
        except (SafetensorError, KeyError, json.JSONDecodeError) as error:
            raise InputError(
                f"{path} is no readable statistics file ({error}); delete it and collect the statistics again"
            ) from error
        return Statistics(moments, header["images"], header["model"], header["data"])


class _Observer:
    """Running moments of what one layer reads, or of some of the channels that it makes."""

    def __init__(self) -> None:
        self.moments: ChannelMoments | None = None

    def see(self, values: Tensor) -> None:
        seen = self.moments
        batch = channel_moments(values, None if seen is None else seen.mean)
        self.moments = batch if seen is None else seen.merge(batch)

    def watch_input(self, layer: nn.Module) -> RemovableHandle:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            self.see(args[0].movedim(channel_dim(module), -1))

        return layer.register_forward_pre_hook(hook)

    def watch_output(self, layer: nn.Module, first: int, channels: int) -> RemovableHandle:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            self.see(output.movedim(channel_dim(module), -1)[..., first : first + channels])

        return layer.register_forward_hook(hook)


def observed_names(site: Site) -> tuple[str, ...]:
    """Give the names under which statistics of a site are kept: its own, or one for queries and one for keys."""
    return (site.name + QUERY, site.name + KEY) if site.kind == "query_key" else (site.name,)


@contextmanager
def _observing(model: nn.Module, sites: Sequence[Site]) -> Iterator[dict[str, _Observer]]:
    observers = {name: _Observer() for site in sites for name in observed_names(site)}
    handles = []
    for site in sites:
        if site.kind == "query_key":
            for name, (layer, first) in zip(observed_names(site), site.rows, strict=True):
                handles.append(observers[name].watch_output(model.get_submodule(layer), first, site.hidden))
        else:
            handles.append(observers[site.name].watch_input(model.get_submodule(site.consumer)))
    try:
        with evaluation_mode(model):
            yield observers
    finally:
        for handle in handles:
            handle.remove()


def collect_statistics(
    model: nn.Module,
    sites: Sequence[Site],
    batches: Iterable[Any],
    *,
    device: torch.device | str | None = None,
    data: str = "",
) -> Statistics:
    """Observe what reaches each site's consumer over all batches, in evaluation mode and without gradients.

    Args:
        model: The dense model; left as it was.
        sites: From `find_sites`.
        batches: Image tensors "batch channels height width", or tuples that begin with one (labels are not read).
        device: Where the images go; by default where the model is.
        data: Fingerprint of the images, kept so that a saved file is not used for other data.

    Raises:
        InputError: No image came, or a site saw a value that is not finite.
    """
    target = torch.device(device) if device is not None else next(model.parameters()).device
    images = 0
    with _observing(model, sites) as observers, torch.no_grad():
        for batch in batches:
            pixels = batch if isinstance(batch, Tensor) else batch[0]
            model(pixels.to(target, non_blocking=True))
            images += pixels.shape[0]
    if images == 0:
        raise InputError("calibration needs at least one image, got none; check the training images")
    moments = {name: _finite(name, observer.moments) for name, observer in observers.items()}
    return Statistics(moments, images, model_fingerprint(model), data)


def _finite(name: str, moments: ChannelMoments | None) -> ChannelMoments:
    if moments is None:
        raise InputError(f"site {name} was never run during calibration; it cannot be pruned from statistics")
    found = moments.to("cpu")
    bad = int((~(found.mean.isfinite() & found.m2.isfinite())).sum())
    if bad:
        raise InputError(
            f"activations at site {name} must be finite, got NaN or infinity in {bad} channels during "
            "calibration; check the weights and the preprocessing, or run in float32"
        )
    return found
