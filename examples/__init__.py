"""Muon8bit in the loops that people have. From the repository root: `python -m examples.trainer`."""
