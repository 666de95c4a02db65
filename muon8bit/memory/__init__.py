"""Will it fit: bytes of a training run, predicted from the model's configuration alone.

`estimate` has the formula of the peak, `optimizers` those of state and workspace, `activations` counts a pass.
"""

from .advice import Verdict, judge
from .estimate import Estimate, Estimator, Memory, Peak
from .models import load_config
from .optimizers import LABELS, OPTIMIZERS
from .setup import Setup, parse_bytes
from .table import describe, plot, print_table

__all__ = [
    "LABELS",
    "OPTIMIZERS",
    "Estimate",
    "Estimator",
    "Memory",
    "Peak",
    "Setup",
    "Verdict",
    "describe",
    "judge",
    "load_config",
    "parse_bytes",
    "plot",
    "print_table",
]
