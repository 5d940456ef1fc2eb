"""Measured times of the layers around each site at several widths, and what a plan would take by them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vbp.errors import InputError
from vbp.pruning.plan import PruningPlan
from vbp.runtime.decode import from_json, to_json
from vbp.runtime.files import write_json

_FORMAT = "vbp-layer-times/1"


@dataclass(frozen=True)
class TimingConditions:
    """What times depend on: they hold under these conditions and no others.

    Attributes:
        hardware: The device, in words.
        threads: In use on a CPU; 0 on a GPU.
        precision: Type of the weights, and of autocast if there is one.
        batch: Shape of the batch.
        torch: Version.
        model: Fingerprint of the names and shapes of the dense model's weights, and of its sites.
        round_to: Of the plans: widths between its multiples take longer.
        clock: `wall`, or `processor`; see `clock_of`.
    """

    hardware: str
    threads: int
    precision: str
    batch: tuple[int, ...]
    torch: str
    model: str
    round_to: int
    clock: str


@dataclass(frozen=True)
class TimedUnit:
    """Channels that are timed together: those of an MLP site, or the values, queries and keys of an attention.

    Attributes:
        sites: Their names; the first one's width stands for all.
        curve: The first site of the unit that was timed for all units of this shape.
    """

    sites: tuple[str, ...]
    curve: str


@dataclass(frozen=True)
class LayerTimes:
    """What a dense model takes, and its units at several widths: plain data that any process can use.

    Attributes:
        dense_ms: Of a batch, in the same minute as the curves.
        units: Of the model.
        curves: Name -> (width, milliseconds), ascending in both; the last is the dense width.
    """

    conditions: TimingConditions
    dense_ms: float
    units: tuple[TimedUnit, ...]
    curves: Mapping[str, tuple[tuple[int, float], ...]]

    def predicted_ms(self, plan: PruningPlan) -> float:
        """Return what a batch would take under a plan: the dense time less what each unit saves.

        Between two measured widths the time is interpolated; below the narrowest one it goes on in a straight line.
        """
        widths = plan.widths
        return self.dense_ms - sum(self._saved_ms(unit, widths[unit.sites[0]][0]) for unit in self.units)

    def share(self, plan: PruningPlan) -> float:
        """Return what a plan would take as a share of the dense time."""
        return self.predicted_ms(plan) / self.dense_ms

    def _saved_ms(self, unit: TimedUnit, width: int) -> float:
        points = self.curves[unit.curve]
        (x0, y0), (x1, y1) = points[0], points[min(1, len(points) - 1)]
        if width < x0 and x1 > x0:
            return points[-1][1] - max(0.0, y0 - (x0 - width) * (y1 - y0) / (x1 - x0))
        return points[-1][1] - float(np.interp(width, [x for x, _ in points], [y for _, y in points]))

    def check_made_for(self, conditions: TimingConditions) -> None:
        """Refuse times that were measured under other conditions.

        Raises:
            InputError: What differs is named.
        """
        mine, wanted = asdict(self.conditions), asdict(conditions)
        differing = [f"{name} {mine[name]!r} and not {wanted[name]!r}" for name in mine if mine[name] != wanted[name]]
        if differing:
            raise InputError(f"layer times were measured with {'; '.join(differing)}; measure them again")

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON data."""
        return {"format": _FORMAT, **to_json(self)}

    @staticmethod
    def from_dict(value: Mapping[str, Any]) -> LayerTimes:
        """Read what `to_dict` gave.

        Raises:
            InputError: The data is no table of layer times, or of another format.
        """
        found = value.get("format") if isinstance(value, Mapping) else type(value).__name__
        if found != _FORMAT:
            raise InputError(f"layer times must have format {_FORMAT}, got {found!r}; measure them again")
        rest = {name: item for name, item in value.items() if name != "format"}
        times = from_json(LayerTimes, rest, "the table of layer times", "measure them again")
        if not times.dense_ms > 0 or any(not times.curves.get(unit.curve) for unit in times.units):
            raise InputError("the layer times are damaged: a time or a curve is missing; measure them again")
        return times

    def save(self, path: Path) -> None:
        """Write JSON that `load` reads, whole or not at all.

        Raises:
            OutputError: It could not be written.
        """
        write_json(path, self.to_dict())

    @staticmethod
    def load(path: Path) -> LayerTimes:
        """Read a file that `save` wrote.

        Raises:
            InputError: The file is missing, damaged or something else.
        """
        try:
            return LayerTimes.from_dict(json.loads(path.read_text()))
        except (OSError, ValueError) as error:
            raise InputError(f"{path} holds no layer times ({error}); measure them again") from error
