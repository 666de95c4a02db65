"""From a model to parameter groups: which parameters are whose, and why."""

from .groups import ParamGroups, param_groups
from .rules import Route

__all__ = ["ParamGroups", "Route", "param_groups"]
