"""Recipes and command-line options."""
