"""Variance-Based Pruning (VBP) for PyTorch image classifiers.

    model + data -> sites -> statistics -> plan -> surgery -> fine-tune -> artefact + report

`vbp.run(config)` does it all; the functions below are its steps, each usable by itself.

Source: Berisha, Mehnert, Condurache, "Variance-Based Pruning for Accelerating and Compressing Trained Networks",
ICCV 2025, arXiv 2507.12988.
"""

from vbp.artifacts import PrunedArtifact, load_pruned, read_artifact, save_pruned
from vbp.auto import AutoPlan, auto_plan
from vbp.budgets import Budget, BudgetResult
from vbp.compensation import mean_shift
from vbp.config import RunConfig
from vbp.cost import PlanCost, count_macs, count_parameters, format_plan, plan_cost
from vbp.covariance import ChannelCovariance, covariance_bytes
from vbp.criteria import Evidence, criterion_scores
from vbp.data import ImageList, ImageLoader, balanced_subset, list_images, make_loader
from vbp.distillation import DistillationLoss
from vbp.divergence import HeldBack
from vbp.elimination import Elimination, eliminate
from vbp.errors import InputError, OutputError
from vbp.evaluation import Accuracy, evaluate
from vbp.export import ExportReport, export_model, open_exported
from vbp.finetune import EpochResult, Trainer
from vbp.head_refit import DenseAnswers, HeadRefit, refit_head_
from vbp.hidden_samples import HiddenSamples
from vbp.inspection import Inspection, SiteDescription, describe_sites, inspect_model
from vbp.latency import LatencyReport, compare_latency
from vbp.latency_runs import LatencySettings
from vbp.models import Classifier, ModelSource, build_model, load_classifier
from vbp.moments import ChannelMoments, channel_moments
from vbp.native import save_native
from vbp.plan import PruningPlan, SitePlan
from vbp.planning import make_plan
from vbp.preprocessing import Preprocessing, evaluation_transform, training_transform
from vbp.producer_refit import ProducerRefit, refit_producers_
from vbp.publishing import model_card, push_to_hub
from vbp.ranking import eliminations, output_variance_scores, variance_scores
from vbp.recipe import run
from vbp.refit import Reconstruction
from vbp.report import Measured, RunReport
from vbp.sampling import TokenSample
from vbp.sensing import Draws
from vbp.sites import Site, find_sites
from vbp.statistics import Statistics, collect_statistics
from vbp.stream_refit import StreamRefit, refit_stream_
from vbp.surgery import prune_
from vbp.timing import measure_latency_ms
from vbp.torch_pruning import install as _install_in_torch_pruning

# Afterwards torch_pruning has VarianceImportance and VBPPruner; names that it brings itself are left alone.
_install_in_torch_pruning()

__version__ = "0.1.0"

__all__ = [
    "Accuracy",
    "AutoPlan",
    "Budget",
    "BudgetResult",
    "ChannelCovariance",
    "ChannelMoments",
    "Classifier",
    "DenseAnswers",
    "DistillationLoss",
    "Draws",
    "Elimination",
    "EpochResult",
    "Evidence",
    "ExportReport",
    "HeadRefit",
    "HeldBack",
    "HiddenSamples",
    "ImageList",
    "ImageLoader",
    "InputError",
    "Inspection",
    "LatencyReport",
    "LatencySettings",
    "Measured",
    "ModelSource",
    "OutputError",
    "PlanCost",
    "Preprocessing",
    "ProducerRefit",
    "PrunedArtifact",
    "PruningPlan",
    "Reconstruction",
    "RunConfig",
    "RunReport",
    "Site",
    "SiteDescription",
    "SitePlan",
    "Statistics",
    "StreamRefit",
    "TokenSample",
    "Trainer",
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
    "describe_sites",
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
    "measure_latency_ms",
    "model_card",
    "open_exported",
    "output_variance_scores",
    "plan_cost",
    "prune_",
    "push_to_hub",
    "read_artifact",
    "refit_head_",
    "refit_producers_",
    "refit_stream_",
    "run",
    "save_native",
    "save_pruned",
    "training_transform",
    "variance_scores",
]
