"""How far one goes to follow a step: files, functions and calls of ours that it enters. They may only get fewer."""

from __future__ import annotations

import sys
from pathlib import Path

import muon8bit_kernels
import pytest
import torch

import muon8bit
from muon8bit import Muon8bit
from muon8bit.step import muon

ROOTS = tuple(str(Path(package.__file__).parent) for package in (muon8bit, muon8bit_kernels))


def walked(algorithm, num_params=1):
    """Code objects that a second step enters, comprehensions and lambdas aside, and the number of calls."""
    params = [torch.nn.Parameter(torch.randn(64, 128)) for _ in range(num_params)]
    optimizer = Muon8bit([{"params": params, "algorithm": algorithm, "lr": 1e-3}])
    codes, num_calls = set(), 0

    def called(frame, event, _):
        nonlocal num_calls
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(ROOTS) and "<" not in code.co_name:
            codes.add(code)
            num_calls += 1

    for step in range(2):
        for param in params:
            param.grad = torch.randn_like(param)
        sys.setprofile(called if step else None)
        try:
            optimizer.step()
        finally:
            sys.setprofile(None)
    return codes, num_calls


@pytest.mark.parametrize(("algorithm", "num_files", "num_functions"), [("muon", 16, 81), ("adamw", 8, 31)])
def test_a_step_enters_at_most_so_many_files_and_functions(algorithm, num_files, num_functions):
    codes, _ = walked(algorithm)
    assert len({code.co_filename for code in codes}) <= num_files
    assert len(codes) <= num_functions, sorted(code.co_qualname for code in codes)


def test_one_more_matrix_of_a_shape_costs_at_most_so_many_calls():
    assert walked("muon", 16)[1] - walked("muon", 8)[1] <= 8 * 8


def test_momenta_of_a_shape_are_averaged_once(monkeypatch):
    """Also those of the first batch, which are not written before its Newton-Schulz has returned."""
    applied, original = [], muon.average_
    monkeypatch.setattr(
        muon, "average_", lambda batch, *args: applied.append(batch.num_matrices) or original(batch, *args)
    )
    params = [torch.nn.Parameter(torch.randn(shape)) for shape in ((16, 512), (512, 16)) for _ in range(8)]
    for param in params:
        param.grad = torch.randn_like(param)
    Muon8bit(params).step()
    assert applied == [8, 8]
