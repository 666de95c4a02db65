"""One thread: the suite's matrices are small, and two test processes share the cores. Long commands start first."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # numpy reads it when it is imported; commands that tests start take it over

import pytest
import torch
from helpers.background import Background

torch.set_num_threads(1)
COMMANDS = pytest.StashKey[Background]()


def pytest_configure(config):
    config.stash[COMMANDS] = Background()


def pytest_collection_modifyitems(items):
    """Tests that wait for a command come last."""
    items.sort(key=lambda item: item.get_closest_marker("background") is not None)


def pytest_collection_finish(session):
    if not session.config.option.collectonly:
        for item in session.items:
            for mark in item.iter_markers("background"):
                session.config.stash[COMMANDS].start(mark.kwargs["command"])


def pytest_unconfigure(config):
    config.stash[COMMANDS].end()


@pytest.fixture(scope="session")
def background(pytestconfig):
    """A function: the command given to a test's mark `background` -> its result and its folder."""
    return pytestconfig.stash[COMMANDS].result
