"""Failures, kills, and the routes of every model class."""
