"""Helpers that several tests share: oracles, models, ranks, runs, checks."""
