"""Sweeps: arms x learning rates x seeds of one recipe, each run a process of its own with one thread."""
