"""Budgets: limits on the cost of a pruned model, and the plan that was found for one."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, Literal, get_args

from vbp.errors import InputError
from vbp.pruning.make_plan import check_keep_ratio
from vbp.pruning.plan import PruningPlan
from vbp.runtime.decode import to_json
from vbp.runtime.tables import format_count

Quantity = Literal["keep_ratio", "macs", "params", "latency_ms", "speedup"]

_FLAGS: dict[Quantity, str] = {
    "keep_ratio": "keep_ratio",
    "macs": "target_macs",
    "params": "target_params",
    "latency_ms": "target_latency_ms",
    "speedup": "target_speedup",
}

_AMOUNT = re.compile(r"\s*(\d+\.?\d*(?:e[+-]?\d+)?|\.\d+)\s*([kMGT%]?)\s*")
_SCALES = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "%": 0.01}


@dataclass(frozen=True)
class Budget:
    """One limit on what the pruned model costs; `Budget.of` checks it.

    Attributes:
        quantity: What is limited: the share of MLP channels, MACs of one image, parameters, milliseconds of a batch,
            or the speed-up, of which there must be at least so much.
        amount: MACs and parameters below 1 are a share of the dense model's, others a count.

    Example:
        >>> vbp.Budget.of(target_macs="75%")
        Budget(quantity='macs', amount=0.75)
    """

    quantity: Quantity
    amount: float

    @staticmethod
    def of(
        *,
        keep_ratio: float | None = None,
        target_macs: float | str | None = None,
        target_params: float | str | None = None,
        target_latency_ms: float | None = None,
        target_speedup: float | None = None,
    ) -> Budget:
        """Return the one budget that was asked for, its number checked; what a model can reach is checked later.

        Args:
            keep_ratio: Share of the MLP channels, in (0, 1].
            target_macs: A share in (0, 1), as 0.75 or `75%`, or a count, as 940000000 or `0.94G`.
            target_params: Likewise.
            target_latency_ms: Milliseconds of a batch.
            target_speedup: Dense time over pruned time, above 1.

        Raises:
            InputError: None or several were given, or the number is no such budget.
        """
        given = {
            "keep_ratio": keep_ratio,
            "macs": target_macs,
            "params": target_params,
            "latency_ms": target_latency_ms,
            "speedup": target_speedup,
        }
        asked = [name for name in get_args(Quantity) if given[name] is not None]
        if len(asked) != 1:
            allowed = ", ".join(_FLAGS.values())
            got = " and ".join(_FLAGS[name] for name in asked) or "none"
            raise InputError(f"a run has one budget, one of {allowed}; got {got}; give one")
        quantity: Quantity = asked[0]
        value = given[quantity]
        assert value is not None
        if quantity == "keep_ratio":
            check_keep_ratio(quantity, float(value))
        budget = Budget(quantity, parse_amount(_FLAGS[quantity], value))
        if quantity in ("macs", "params") and not (budget.amount < 1 or budget.amount >= 2):
            raise InputError(
                f"{budget.flag} must be a share in (0, 1) or a count, got {budget.amount}; give 0.75 for three "
                "quarters of the dense model, or 0.94G"
            )
        if quantity == "speedup" and not budget.amount > 1:
            raise InputError(f"target_speedup must be above 1, got {budget.amount}; 1.2 is 1.2 times as fast")
        return budget

    @property
    def flag(self) -> str:
        """Return the name under which users know the quantity."""
        return _FLAGS[self.quantity]

    @property
    def timed(self) -> bool:
        """Return whether it can only be met by measuring."""
        return self.quantity in ("latency_ms", "speedup")

    def limit(self, dense: float) -> float:
        """Return the count that MACs, parameters or channels must not exceed, given that of the dense model."""
        assert not self.timed
        return self.amount * dense if self.quantity == "keep_ratio" or self.amount < 1 else self.amount


def parse_amount(name: str, value: float | str) -> float:
    """Read the positive number of a setting, plain or as people write it: 0.75, `75%`, `1.1G`, `4.3 M`.

    Raises:
        InputError: It is no such number.
    """
    amount = value
    if isinstance(value, str):
        match = _AMOUNT.fullmatch(value)
        amount = float(match[1]) * _SCALES[match[2]] if match else math.nan
    if isinstance(amount, str | bool) or not 0 < amount < math.inf:
        raise InputError(f"{name} must be a number above 0, got {value!r}; write 0.75, 75%, 940000000 or 0.94G")
    return float(amount)


@dataclass(frozen=True)
class BudgetResult:
    """A plan, and whether it meets its budget.

    Attributes:
        budget: As it was asked for.
        plan: The largest that meets it, or else the one that comes nearest.
        target: What was asked for in the units of `reached`: channels, MACs, parameters, milliseconds or times.
        dense: What the dense model has of it.
        reached: What the plan has of it: counted, or the measured median.
        met: Whether that meets the target.
        reason: Why not, if not.
        predicted: What a table of measured layers had promised for the plan, of a latency or speed-up.
        spread: Quartiles of the measured values.
        detail: Further plain data, as the attempts of a latency budget and the conditions of its measurements.

    Example:
        >>> vbp.BudgetResult(vbp.Budget.of(keep_ratio=0.5), plan, target=128, dense=256, reached=128, met=True).miss
        0.0
    """

    budget: Budget
    plan: PruningPlan
    target: float
    dense: float
    reached: float
    met: bool
    reason: str = ""
    predicted: float | None = None
    spread: tuple[float, float] | None = None
    detail: dict[str, Any] | None = None

    @property
    def miss(self) -> float:
        """Return by what share of the target the plan is on its wrong side; negative on the right side."""
        over = (self.reached - self.target) / (self.target or 1)
        return -over if self.budget.quantity == "speedup" else over

    @property
    def is_told(self) -> bool:
        """Return whether a user is told of it: a target was given, or the plan misses its keep_ratio."""
        return self.budget.quantity != "keep_ratio" or not self.met

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON data, without the plan, which has a file of its own."""
        values = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "plan"}
        counts = {"kept": self.plan.kept, "channels": self.plan.total}
        return {**to_json(values), "miss": self.miss, **counts, "sentence": self.sentence()}

    def sentence(self) -> str:
        """Return in words what was asked for, what was reached, and by how much and why the budget is missed."""
        show = partial(_shown, self.budget.quantity)
        asked = f"budget {self.budget.flag} {show(self.target)} (dense {show(self.dense)}): {show(self.reached)}"
        if self.spread is not None:
            asked += f" measured ({show(self.spread[0])} to {show(self.spread[1])})"
        if self.predicted is not None:
            asked += f", {show(self.predicted)} predicted"
        return f"{asked}; met" if self.met else f"{asked}; missed by {self.miss:.2%}: {self.reason}"


def _shown(quantity: Quantity, value: float) -> str:
    if quantity == "latency_ms":
        return f"{value:.2f} ms"
    if quantity == "speedup":
        return f"{value:.3f}x"
    if quantity == "keep_ratio":
        return f"{value:.0f} channels"
    return f"{format_count(round(value))} {'MACs' if quantity == 'macs' else 'parameters'}"
