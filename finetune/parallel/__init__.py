"""Launching, ranks, and how a run stops on all of them."""
