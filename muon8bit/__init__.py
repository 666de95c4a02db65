"""Muon with its momentum in 8 bits."""

from .optimizer import Muon8bit, NonFiniteGradientError
from .report import StateReport, state_report
from .routing import ParamGroups, param_groups

__all__ = ["Muon8bit", "NonFiniteGradientError", "ParamGroups", "StateReport", "param_groups", "state_report"]
