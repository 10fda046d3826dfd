"""tierwise: predict, simulate and plan LLM serving with model tiers and speculative drafts.

The names below are loaded when first used, so that ``import tierwise as tw`` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from calibration.measure import Grid as Grid
    from calibration.measure import Request as Request
    from calibration.measure_acceptance import Pair as Pair
    from calibration.observe import Server as Server
    from calibration.profiles import load_profile as load_profile
    from calibration.profiles import serving_profile as serving_profile
    from planner.policy import read_policy as read_policy
    from planner.predict import DraftModel as DraftModel
    from planner.scenario import load_scenario as load_scenario
    from planner.storage import Means as Means
    from theory.acceptance import Acceptance as Acceptance
    from theory.catalog import accelerator as accelerator
    from theory.catalog import accelerators as accelerators
    from theory.catalog import from_hf_config as from_hf_config
    from theory.catalog import model as model
    from theory.catalog import models as models
    from theory.errors import InfeasibleError as InfeasibleError
    from theory.errors import InputError as InputError
    from theory.latency import Pass as Pass
    from theory.latency import Profile as Profile
    from theory.latency import step_time as step_time
    from theory.specs import Accelerator as Accelerator
    from theory.specs import Deployment as Deployment
    from theory.specs import Limits as Limits
    from theory.specs import Transformer as Transformer
    from theory.speculation import speedup as speedup
    from theory.speculation import tokens_per_round as tokens_per_round
    from theory.work import parameters as parameters

    from .result import Result as Result
    from .verbs import draft as draft
    from .verbs import fit as fit
    from .verbs import measure as measure
    from .verbs import measure_acceptance as measure_acceptance
    from .verbs import observe as observe
    from .verbs import plan as plan
    from .verbs import plan_day as plan_day
    from .verbs import predict as predict
    from .verbs import simulate as simulate
    from .verbs import sweep as sweep
    from .verbs import validate_cascade as validate_cascade
    from .verbs import validate_kernels as validate_kernels
    from .verbs import validate_live as validate_live
    from .verbs import validate_quality as validate_quality
    from .verbs import validate_serving as validate_serving
    from .verbs import validate_speculation as validate_speculation
    from .verbs import validate_steps as validate_steps

__version__ = "0.1.0"

_HOME = {
    "calibration.measure": ("Grid", "Request"),
    "calibration.measure_acceptance": ("Pair",),
    "calibration.observe": ("Server",),
    "calibration.profiles": ("load_profile", "serving_profile"),
    "planner.policy": ("read_policy",),
    "planner.predict": ("DraftModel",),
    "planner.scenario": ("load_scenario",),
    "planner.storage": ("Means",),
    "theory.acceptance": ("Acceptance",),
    "theory.catalog": ("accelerator", "accelerators", "from_hf_config", "model", "models"),
    "theory.errors": ("InfeasibleError", "InputError"),
    "theory.latency": ("Pass", "Profile", "step_time"),
    "theory.specs": ("Accelerator", "Deployment", "Limits", "Transformer"),
    "theory.speculation": ("speedup", "tokens_per_round"),
    "theory.work": ("parameters",),
    "tierwise.result": ("Result",),
    "tierwise.verbs": (
        "draft",
        "fit",
        "measure",
        "measure_acceptance",
        "observe",
        "plan",
        "plan_day",
        "predict",
        "simulate",
        "sweep",
        "validate_cascade",
        "validate_kernels",
        "validate_live",
        "validate_quality",
        "validate_serving",
        "validate_speculation",
        "validate_steps",
    ),
}
_MODULE = {name: module for module, names in _HOME.items() for name in names}
__all__ = sorted(_MODULE)


def __getattr__(name: str) -> Any:
    if name not in _MODULE:
        raise AttributeError(f"module 'tierwise' has no attribute {name!r}")
    return getattr(import_module(_MODULE[name]), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
