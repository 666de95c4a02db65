"""Experiments behind docs/results/evidence.md: arms that are no product, their data, and the tables of the records."""
