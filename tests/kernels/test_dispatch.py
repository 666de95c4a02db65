"""Which implementation runs, and what is said where none can."""

from __future__ import annotations

import importlib.metadata
import importlib.util

import pytest
import torch
from muon8bit_kernels import dispatch, kernels_for, reference

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(("device", "backend"), [(CPU, None), (CPU, "reference"), (CUDA, "reference")])
def test_reference_runs_off_cuda_and_wherever_it_is_asked_for(device, backend, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # does not make Triton the default
    assert kernels_for(device, backend) is reference


@pytest.fixture(autouse=True)
def _forget():
    """What is asked for here must be decided here."""
    dispatch.kernels_for.cache_clear()
    yield
    dispatch.kernels_for.cache_clear()


@pytest.mark.parametrize("backend", [None, "triton"])
def test_triton_runs_on_cuda(backend, triton_kernels):
    assert kernels_for(CUDA, backend) is triton_kernels


def test_triton_runs_on_cpu_where_it_is_interpreted(triton_kernels, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert kernels_for(CPU, "triton") is triton_kernels


def test_triton_on_cpu_without_the_interpreter_raises_with_the_ways_out(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match=r"on cpu.*CUDA device.*TRITON_INTERPRET=1.*backend='reference'"):
        kernels_for(CPU, "triton")


@pytest.mark.parametrize(("device", "backend"), [(CUDA, None), (CUDA, "triton"), (CPU, "triton")])
def test_missing_triton_raises_with_the_ways_out(device, backend, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "triton" else find_spec(name))
    with pytest.raises(RuntimeError, match=r"not installed.*install triton.*backend='reference'"):
        kernels_for(device, backend)
    assert kernels_for(device, "reference") is reference


@pytest.mark.parametrize("device", [CPU, CUDA])
@pytest.mark.parametrize("backend", ["cuda", "", "Triton"])
def test_an_unknown_backend_raises(device, backend):
    with pytest.raises(ValueError, match="backend must be None, 'reference' or 'triton', not"):
        kernels_for(device, backend)


def test_a_compiler_that_fuses_on_blackwell_is_refused(monkeypatch):
    triton = pytest.importorskip("triton")
    monkeypatch.setattr(triton, "__version__", "3.7.1")
    dispatch._check_compiler((10, 0))
    monkeypatch.setattr(triton, "__version__", "3.6.0")
    dispatch._check_compiler((9, 0))
    with pytest.raises(RuntimeError, match=r"triton 3\.6\.0 fuses.*capability 10.*Upgrade torch.*backend='reference'"):
        dispatch._check_compiler((10, 0))


def _on_a_gpu(monkeypatch, capability):
    """Make this process see a CUDA device, whose kernels are the reference."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    checked = []
    monkeypatch.setattr(dispatch, "self_check", lambda _, device: checked.append(device))
    return checked


def test_triton_of_a_distribution_with_another_name_runs(triton_kernels, monkeypatch):
    """As on Windows and in nightly builds."""

    def version(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    for capability in ((9, 0), (10, 0)):
        dispatch.kernels_for.cache_clear()
        _on_a_gpu(monkeypatch, capability)
        assert kernels_for(CUDA) is triton_kernels


@pytest.mark.usefixtures("triton_kernels")
def test_kernels_are_checked_once_a_device(monkeypatch):
    checked = _on_a_gpu(monkeypatch, (9, 0))
    for index in (0, 1, 0, 1):
        kernels_for(torch.device("cuda", index))
    kernels_for(torch.device("cuda", 0), "reference")
    assert checked == [torch.device("cuda", 0), torch.device("cuda", 1)]
