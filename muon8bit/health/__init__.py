"""Quantization health: a sample of matrices watched while a run trains, with their momenta in fp32 beside."""

from .measures import MatrixHealth
from .quantization import QuantizationHealth
from .report import HealthReport, QuantizationWarning

__all__ = ["HealthReport", "MatrixHealth", "QuantizationHealth", "QuantizationWarning"]
