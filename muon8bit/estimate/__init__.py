"""Will it fit, does it fit: bytes of a training run, predicted from the model's configuration, or of a checkpoint.

`estimate` has the formula of the peak, `optimizers` those of state and workspace, `activations` counts a pass.
"""

from .advice import BudgetCheck, check_budget
from .checkpoint import Report, report
from .estimator import Estimate, Estimator, Memory, Peak
from .models import load_config
from .optimizers import LABELS, OPTIMIZERS
from .setup import Setup, parse_bytes
from .table import describe, plot, print_report, print_table

__all__ = [
    "LABELS",
    "OPTIMIZERS",
    "BudgetCheck",
    "Estimate",
    "Estimator",
    "Memory",
    "Peak",
    "Report",
    "Setup",
    "check_budget",
    "describe",
    "load_config",
    "parse_bytes",
    "plot",
    "print_report",
    "print_table",
    "report",
]
