"""tierwise: predict, simulate and plan LLM serving with model tiers and speculative drafts.

The names below are loaded when first used, so that ``import tierwise as tw`` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from calibration.profiles import load_profile as load_profile
    from calibration.profiles import serving_profile as serving_profile
    from planner.policy import read_policy as read_policy
    from planner.predict import DraftModel as DraftModel
    from planner.predict import predict as predict
    from planner.scenario import load_scenario as load_scenario
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

    from .verbs import plan as plan
    from .verbs import plan_day as plan_day
    from .verbs import simulate as simulate

__version__ = "0.1.0"

_HOME = {
    "calibration.profiles": ("load_profile", "serving_profile"),
    "planner.policy": ("read_policy",),
    "planner.predict": ("DraftModel", "predict"),
    "planner.scenario": ("load_scenario",),
    "theory.acceptance": ("Acceptance",),
    "theory.catalog": ("accelerator", "accelerators", "from_hf_config", "model", "models"),
    "theory.errors": ("InfeasibleError", "InputError"),
    "theory.latency": ("Pass", "Profile", "step_time"),
    "theory.specs": ("Accelerator", "Deployment", "Limits", "Transformer"),
    "theory.speculation": ("speedup", "tokens_per_round"),
    "theory.work": ("parameters",),
    "tierwise.verbs": ("plan", "plan_day", "simulate"),
}
_MODULE = {name: module for module, names in _HOME.items() for name in names}
__all__ = sorted(_MODULE)


def __getattr__(name: str) -> Any:
    if name not in _MODULE:
        raise AttributeError(f"module 'tierwise' has no attribute {name!r}")
    return getattr(import_module(_MODULE[name]), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
