"""Look at every architecture of the tests and write what is found in each to docs/architectures.md.

    python benchmarks/architectures.py

Runs on a CPU in about half a minute, without network: the models are small and their weights random.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch
import tyro
from torch import Tensor, nn

from vbp import InputError, SitePlan, collect_statistics, make_plan, plan_cost, variance_scores
from vbp.deploy.artifact import installed_versions
from vbp.pruning.attention import rotate_
from vbp.pruning.surgery import check_prunable
from vbp.runtime.forward import logits_of

_ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(_ROOT / "tests" / "support"))

from architectures import ARCHITECTURES, Architecture, noticeable_  # noqa: E402

KEEP_RATIO = 0.6
HEAD = (
    "Family", "Library", "Model", "MLP sites", "Mean shift", "Attention (`--bottleneck`)", "Principal basis",
    "MACs (M) at keep 0.6",
)  # fmt: skip
INTRODUCTION = f"""# Architectures

Each family below is built small (few blocks, random weights), checked by `tests/project/test_architectures.py`:

- all its sites are found, and pruned globally at keep ratio {KEEP_RATIO}, and to a tenth in every site;
- the logits of the pruned model equal those of the dense one whose removed channels are held at their means (float64,
  1e-10). *Exact* says that every channel goes from its producer to its consumer by itself. *Inexact* says that a norm
  over the channels (GRN, an inner LayerNorm) lies between: what is removed also changes what stays, and the pruned
  model equals the dense one with that norm restricted to the channels that stay;
- a training step gives a gradient to every weight that had one, the MACs fall to what `plan_cost` promises, and
  a saved model comes back bit-equal through `load_pruned`;
- attention: with queries and keys removed in pairs and values held at their means the same equality holds, every head
  keeps the same number of channels, and saving and training work. Where attention cannot be pruned, the reason stands
  in its place: asking for it is an error that leaves the model as it was, and the MLP sites can be pruned without it;
  *Split* says that `vbp.split_attention_(model)` gave these attentions layers of their own, as `vbp run` and
  `vbp.prune` do where attention is pruned. Values go alone where something stands between queries, keys and softmax;
- principal basis: in how many of these attentions directions can go in the place of channels
  ([Attention](mathematics.md#attention)), and the largest change of a logit by the change of basis alone, in float64
  with noticeable weights, for images of which the statistics are and others: at most 1e-10.

The MACs are those of the small model on one image, before and after pruning the MLP sites alone.
"""
REMARKS = """
Squeeze-and-excitation layers (MaxViT, CoAtNet) and MLP heads (ConvFormer, CAFormer, MaxViT, SigLIP's pooling) are
sites like any other. Hugging Face's SigLIP classifier averages the tokens and does not read its pooling head: pruning
that site changes no logit. Models outside this list are not refused for that: `vbp.find_sites` follows their forward
pass in the same way, and says by name what it could not prune.
"""


@dataclass(frozen=True)
class Options:
    """Write the table of architectures."""

    output: Path = _ROOT / "docs" / "architectures.md"
    """The file to write."""


def row(entry: Architecture) -> tuple[str, ...]:
    """Prune one architecture and give its line of the table.

    Raises:
        RuntimeError: What is found differs from what the tests expect.
    """
    model, images = entry.build(), entry.images(2, torch.float32)
    _expect(entry, "attentions", _attentions(entry, model, images), entry.attention if _counted(entry) else "refused")
    turned = _principal(entry) if _counted(entry) else ""
    if not entry.sites:
        _expect(entry, "sites", _found(entry, model, images), "refused")
        return (*entry.cells(), turned, "")
    sites = entry.find(model, images)
    check_prunable(model, sites, images[:1])
    _expect(entry, "sites", len(sites), entry.sites)
    _expect(entry, "inexact sites", sum(not site.exact for site in sites), entry.inexact)
    scores = variance_scores(collect_statistics(model, sites, [images]))
    before, after = plan_cost(model, make_plan(sites, scores, keep_ratio=KEEP_RATIO), images[:1]).macs
    return (*entry.cells(), turned, f"{before / 1e6:.2f} → {after / 1e6:.2f} ({after / before - 1:+.0%})")


def _counted(entry: Architecture) -> bool:
    return isinstance(entry.attention, int)


def _found(entry: Architecture, model: nn.Module, images: Tensor) -> int | str:
    try:
        return len(entry.find(model, images))
    except InputError:
        return "refused"


def _attentions(entry: Architecture, model: nn.Module, images: Tensor) -> int | str:
    """Count the attentions of which values, queries and keys can be pruned."""
    try:
        sites = entry.find(model, images, attention=True)
        check_prunable(model, sites, images[:1])
    except InputError:
        return "refused"
    kinds = ("value",) if entry.values_alone else ("value", "query_key")
    return min(sum(site.kind == kind for site in sites) for kind in kinds)


def _principal(entry: Architecture) -> str:
    """Turn every attention that allows it to its principal basis; return their number and the change of the logits.

    Raises:
        RuntimeError: A logit changes by more than rounding.
    """
    images = entry.images(8)
    model = noticeable_(entry.build().double(), images)
    sites = [site for site in entry.find(model, images, attention=True) if site.kind != "mlp" and site.rotatable]
    if not sites:
        return "0"
    statistics = collect_statistics(model, sites, [images[:4]], covariance=True)
    with torch.no_grad():
        before = logits_of(model(images))
        whole = [SitePlan(site, tuple(range(site.hidden)), "principal") for site in sites]
        rotate_(model, whole, statistics.means, statistics.covariances)
        change = float((logits_of(model(images)) - before).abs().max())
    _expect(entry, "the basis changes logits by more than 1e-10, which", change > 1e-10, False)
    return f"{sum(site.kind == 'value' for site in sites)} ({change:.0e})"


def _expect(entry: Architecture, what: str, found: object, wanted: object) -> None:
    if found != wanted:
        raise RuntimeError(
            f"{what} of {entry.label} must be {wanted}, got {found}; correct tests/support/architectures.py"
        )


def main(options: Options) -> None:
    """Look at every architecture and write the document."""
    torch.manual_seed(0)
    rows = []
    for entry in ARCHITECTURES:
        rows.append(row(entry))
        print(entry.label, *rows[-1][3:], sep=" | ")
    table = "\n".join("| " + " | ".join(cells) + " |" for cells in (HEAD, ("---",) * len(HEAD), *rows))
    versions = installed_versions()
    used = ", ".join(f"{name} {versions[name]}" for name in ("torch", "timm", "transformers", "torchvision"))
    made = (
        f"Written by `python benchmarks/architectures.py` on {datetime.now(UTC):%Y-%m-%d} with Python "
        f"{sys.version_info.major}.{sys.version_info.minor}, {used}.\n"
    )
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(f"{INTRODUCTION}\n{made}\n{table}\n{REMARKS}", encoding="utf-8")


if __name__ == "__main__":
    main(tyro.cli(Options))
