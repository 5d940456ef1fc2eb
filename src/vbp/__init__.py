"""Variance-Based Pruning (VBP) for PyTorch image classifiers.

    model + data -> sites -> statistics -> plan -> surgery -> fine-tune -> artefact + report

`vbp.run(config)` does it all; the functions below are its steps, each usable by itself.

Source: Berisha, Mehnert, Condurache, "Variance-Based Pruning for Accelerating and Compressing Trained Networks",
ICCV 2025, arXiv 2507.12988.
"""

from vbp.cost.budget import Budget, BudgetResult
from vbp.cost.inspection import Inspection, SiteDescription, inspect_model
from vbp.cost.macs import PlanCost, count_macs, count_parameters, format_plan, plan_cost
from vbp.data.data_path import list_images
from vbp.data.folder import ImageList
from vbp.data.images import balanced_subset
from vbp.data.loader import ImageLoader, make_loader
from vbp.data.preprocessing import Preprocessing, evaluation_transform, training_transform
from vbp.deploy.artifact import PrunedArtifact, load_pruned, read_artifact, save_pruned
from vbp.deploy.export import ExportReport, export_model, open_exported
from vbp.deploy.latency import LatencyReport, compare_latency
from vbp.deploy.latency_backends import LatencySettings
from vbp.deploy.model_card import model_card, push_to_hub
from vbp.deploy.native import save_native
from vbp.errors import InputError, OutputError
from vbp.method.covariance import ChannelCovariance, covariance_bytes
from vbp.method.elimination import Elimination, eliminate
from vbp.method.mean_shift import mean_shift
from vbp.method.moments import ChannelMoments, channel_moments
from vbp.method.ridge import Reconstruction
from vbp.method.sampling import Draws, TokenSample
from vbp.models.classifier import Classifier, ModelSource
from vbp.models.load import build_model, load_classifier
from vbp.pruning.auto import auto_plan
from vbp.pruning.choice import PlanChoice
from vbp.pruning.criteria import criterion_scores, eliminations, output_variance_scores, variance_scores
from vbp.pruning.divergence import DenseReference
from vbp.pruning.make_plan import make_plan
from vbp.pruning.plan import PruningPlan, SitePlan
from vbp.pruning.surgery import prune_
from vbp.recipes.config import RunConfig
from vbp.recipes.run import run
from vbp.refit.head import HeadRefit, refit_head_
from vbp.refit.producers import ProducerRefit, refit_producers_
from vbp.refit.refits import RefitReport, refit_
from vbp.refit.stream import StreamRefit, refit_stream_
from vbp.report.run_report import Measured, RunReport
from vbp.sites.site import Site, find_sites
from vbp.statistics.collect import collect_statistics
from vbp.statistics.evidence import Evidence
from vbp.statistics.mlp_samples import MLPSamples
from vbp.statistics.statistics import Statistics
from vbp.torch_pruning.install import install as _install_in_torch_pruning
from vbp.training.evaluate import Accuracy, evaluate
from vbp.training.losses import DistillationLoss
from vbp.training.meters import EpochResult
from vbp.training.trainer import Trainer, TrainerSettings

# Afterwards torch_pruning has VarianceImportance and VBPPruner; names that it brings itself are left alone.
_install_in_torch_pruning()

__version__ = "0.1.0"

__all__ = [
    "Accuracy",
    "Budget",
    "BudgetResult",
    "ChannelCovariance",
    "ChannelMoments",
    "Classifier",
    "DenseReference",
    "DistillationLoss",
    "Draws",
    "Elimination",
    "EpochResult",
    "Evidence",
    "ExportReport",
    "HeadRefit",
    "ImageList",
    "ImageLoader",
    "InputError",
    "Inspection",
    "LatencyReport",
    "LatencySettings",
    "MLPSamples",
    "Measured",
    "ModelSource",
    "OutputError",
    "PlanChoice",
    "PlanCost",
    "Preprocessing",
    "ProducerRefit",
    "PrunedArtifact",
    "PruningPlan",
    "Reconstruction",
    "RefitReport",
    "RunConfig",
    "RunReport",
    "Site",
    "SiteDescription",
    "SitePlan",
    "Statistics",
    "StreamRefit",
    "TokenSample",
    "Trainer",
    "TrainerSettings",
    "auto_plan",
    "balanced_subset",
    "build_model",
    "channel_moments",
    "collect_statistics",
    "compare_latency",
    "count_macs",
    "count_parameters",
    "covariance_bytes",
    "criterion_scores",
    "eliminate",
    "eliminations",
    "evaluate",
    "evaluation_transform",
    "export_model",
    "find_sites",
    "format_plan",
    "inspect_model",
    "list_images",
    "load_classifier",
    "load_pruned",
    "make_loader",
    "make_plan",
    "mean_shift",
    "model_card",
    "open_exported",
    "output_variance_scores",
    "plan_cost",
    "prune_",
    "push_to_hub",
    "read_artifact",
    "refit_",
    "refit_head_",
    "refit_producers_",
    "refit_stream_",
    "run",
    "save_native",
    "save_pruned",
    "training_transform",
    "variance_scores",
]
