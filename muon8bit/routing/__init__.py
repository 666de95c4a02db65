"""From a model to parameter groups: which parameters are whose, and why."""

from .groups import param_groups
from .rules import Route
from .scaling import Scaling
from .table import ParamGroups

__all__ = ["ParamGroups", "Route", "Scaling", "param_groups"]
