"""Muon with its momentum in 8 bits."""

from .convert import convert_state_dict
from .gradient_release import release_gradients
from .optimizer import Muon8bit
from .report import StateReport, state_report
from .routing import ParamGroups, param_groups
from .step.nonfinite import NonFiniteGradientError

__version__ = "0.1.0"

__all__ = [
    "Muon8bit",
    "NonFiniteGradientError",
    "ParamGroups",
    "StateReport",
    "convert_state_dict",
    "param_groups",
    "release_gradients",
    "state_report",
]
