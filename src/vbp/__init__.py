"""Variance-Based Pruning (VBP) for PyTorch image classifiers.

    model + data -> sites -> statistics -> plan -> surgery -> fine-tune -> artefact + report

`vbp.run(config)` does it all; the functions below are its steps, each usable by itself. A name is imported when it is
first used, so that `import vbp` costs nothing.

Source: Berisha, Mehnert, Condurache, "Variance-Based Pruning for Accelerating and Compressing Trained Networks",
ICCV 2025, arXiv 2507.12988.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vbp.runtime.lazy import lazy_names
from vbp.torch_pruning.hook import install_on_import

# The public names: one more is one more line here.
if TYPE_CHECKING:
    from vbp.cost.budget import Budget as Budget
    from vbp.cost.budget import BudgetResult as BudgetResult
    from vbp.cost.inspection import inspect_model as inspect_model
    from vbp.cost.macs import PlanCost as PlanCost
    from vbp.cost.macs import count_macs as count_macs
    from vbp.cost.macs import count_parameters as count_parameters
    from vbp.cost.macs import format_plan as format_plan
    from vbp.cost.macs import plan_cost as plan_cost
    from vbp.data.data_path import list_images as list_images
    from vbp.data.images import balanced_subset as balanced_subset
    from vbp.data.loader import make_loader as make_loader
    from vbp.data.preprocessing import Preprocessing as Preprocessing
    from vbp.data.preprocessing import evaluation_transform as evaluation_transform
    from vbp.data.preprocessing import training_transform as training_transform
    from vbp.deploy.artifact import PrunedArtifact as PrunedArtifact
    from vbp.deploy.artifact import load_pruned as load_pruned
    from vbp.deploy.artifact import read_artifact as read_artifact
    from vbp.deploy.artifact import save_pruned as save_pruned
    from vbp.deploy.export import export_model as export_model
    from vbp.deploy.export import open_exported as open_exported
    from vbp.deploy.latency import compare_latency as compare_latency
    from vbp.deploy.model_card import model_card as model_card
    from vbp.deploy.model_card import push_to_hub as push_to_hub
    from vbp.deploy.native import save_native as save_native
    from vbp.errors import InputError as InputError
    from vbp.errors import OutputError as OutputError
    from vbp.method.mean_shift import mean_shift as mean_shift
    from vbp.models.classifier import Classifier as Classifier
    from vbp.models.classifier import ModelSource as ModelSource
    from vbp.models.load import build_model as build_model
    from vbp.models.load import load_classifier as load_classifier
    from vbp.models.split_attention import split_attention_ as split_attention_
    from vbp.pruning.auto import auto_plan as auto_plan
    from vbp.pruning.criteria import criterion_scores as criterion_scores
    from vbp.pruning.criteria import output_variance_scores as output_variance_scores
    from vbp.pruning.criteria import variance_scores as variance_scores
    from vbp.pruning.divergence import DenseReference as DenseReference
    from vbp.pruning.make_plan import make_plan as make_plan
    from vbp.pruning.plan import PlanChoice as PlanChoice
    from vbp.pruning.plan import PruningPlan as PruningPlan
    from vbp.pruning.plan import SitePlan as SitePlan
    from vbp.pruning.surgery import prune_ as prune_
    from vbp.recipes.config import RunConfig as RunConfig
    from vbp.recipes.prune_model import prune as prune
    from vbp.recipes.run import run as run
    from vbp.refit.refits import refit_ as refit_
    from vbp.report.prune_result import PruneResult as PruneResult
    from vbp.report.run_report import RunReport as RunReport
    from vbp.sites.find import find_sites as find_sites
    from vbp.sites.site import Site as Site
    from vbp.statistics.collect import collect_statistics as collect_statistics
    from vbp.statistics.statistics import Statistics as Statistics
    from vbp.training.evaluate import Accuracy as Accuracy
    from vbp.training.evaluate import evaluate as evaluate
    from vbp.training.losses import DistillationLoss as DistillationLoss
    from vbp.training.trainer import Trainer as Trainer
    from vbp.training.trainer import TrainerSettings as TrainerSettings

__version__ = "0.1.0"

if not TYPE_CHECKING:  # else a type checker would take any name for a public one
    __getattr__, __dir__ = lazy_names(__name__, __file__)

install_on_import()
