"""Checks of a script's refusals of bad input, for the tests of both scripts."""


def check_refused(outcome, *words):
    """Exit code 2 and one sentence that has all these words."""
    assert outcome.code == 2, outcome
    lines = outcome.err.strip().splitlines()
    assert len(lines) == 1, lines
    for word in words:
        assert word in lines[0], lines[0]
