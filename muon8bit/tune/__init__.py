"""`muon8bit tune`: measures the rates of the GPU at hand, and keeps them for later processes."""

from __future__ import annotations

from .measure import DRY_PLAN, Plan, measure
from .timing import Clock, Result, TimedJob, UnavailableError

__all__ = ["DRY_PLAN", "Clock", "Plan", "Result", "TimedJob", "UnavailableError", "measure"]
