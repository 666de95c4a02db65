"""Muon with its momentum in 8 bits."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .convert import convert_state_dict
    from .family import AdaMuon8bit, NorMuon8bit
    from .gradient_release import release_gradients
    from .health import HealthReport, MatrixHealth, QuantizationHealth, QuantizationWarning
    from .optimizer import Muon8bit
    from .report import StateReport, state_report
    from .routing import ParamGroups, Scaling, param_groups
    from .singular_values import MatrixSpectrum, Spectra, Spectrum, spectra
    from .stack_activity import StackActivity
    from .step.nonfinite import NonFiniteGradientError

__version__ = "0.2.0.dev0"

__all__ = [
    "AdaMuon8bit",
    "HealthReport",
    "MatrixHealth",
    "MatrixSpectrum",
    "Muon8bit",
    "NonFiniteGradientError",
    "NorMuon8bit",
    "ParamGroups",
    "QuantizationHealth",
    "QuantizationWarning",
    "Scaling",
    "Spectra",
    "Spectrum",
    "StackActivity",
    "StateReport",
    "convert_state_dict",
    "param_groups",
    "release_gradients",
    "spectra",
    "state_report",
]

# Where the public names live. They are imported when they are first used, so that `muon8bit --help` needs no torch.
_MODULES = {
    "AdaMuon8bit": "family",
    "HealthReport": "health",
    "MatrixHealth": "health",
    "MatrixSpectrum": "singular_values",
    "Muon8bit": "optimizer",
    "NonFiniteGradientError": "step.nonfinite",
    "NorMuon8bit": "family",
    "ParamGroups": "routing",
    "QuantizationHealth": "health",
    "QuantizationWarning": "health",
    "Scaling": "routing",
    "Spectra": "singular_values",
    "Spectrum": "singular_values",
    "StackActivity": "stack_activity",
    "StateReport": "report",
    "convert_state_dict": "convert",
    "param_groups": "routing",
    "release_gradients": "gradient_release",
    "spectra": "singular_values",
    "state_report": "report",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_MODULES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
