"""Whole runs: losses and peaks."""
