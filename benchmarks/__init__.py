"""Benchmarks and their records; not shipped."""
