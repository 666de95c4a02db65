"""Will it fit, does it fit: bytes of a training run, predicted from the model's configuration, or of a checkpoint.

`estimate` has the formula of the peak, `optimizers` those of state and workspace, `activations` counts a pass.
"""

from .._text import gib
from .advice import Advice, BudgetCheck, Offer, advise, check_budget, offers
from .checkpoint import Report, report
from .classes import longest
from .command import Script, column_of, command, script_for, script_options, setup_of
from .configs import is_hub_reachable, load_config
from .estimator import Estimate, Estimator, Memory, Peak
from .optimizers import FAMILY, LABELS, OPTIMIZERS
from .presets import NAMES as PRESETS, hub_name
from .setup import Setup, parse_budget, parse_bytes
from .table import describe, plot, print_offers, print_report, print_table

__all__ = [
    "FAMILY",
    "LABELS",
    "OPTIMIZERS",
    "PRESETS",
    "Advice",
    "BudgetCheck",
    "Estimate",
    "Estimator",
    "Memory",
    "Offer",
    "Peak",
    "Report",
    "Script",
    "Setup",
    "advise",
    "check_budget",
    "column_of",
    "command",
    "describe",
    "gib",
    "hub_name",
    "is_hub_reachable",
    "load_config",
    "longest",
    "offers",
    "parse_budget",
    "parse_bytes",
    "plot",
    "print_offers",
    "print_report",
    "print_table",
    "report",
    "script_for",
    "script_options",
    "setup_of",
]
