"""The order of `CudaCopyStream` on streams that only keep account: what must be over before what, without a GPU."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch

from muon8bit.step import offload
from muon8bit.step.offload import CudaCopyStream, OffloadTask, StateOffload


class Stream:
    """Its operations in order; each knows which operations of all streams are over when it begins."""

    def __init__(self, _device=None):
        self.over = frozenset()

    def do(self, operation, log):
        log[operation] = self.over
        self.over |= {operation}

    def record_event(self):
        return self.over

    def wait_event(self, event):
        self.over |= event

    def wait_stream(self, stream):
        self.over |= stream.over


@pytest.fixture
def streams(monkeypatch):
    """The current stream, and what was over before each operation. Copies are done at once, and logged on the stream
    whose context they are in."""
    current, log, inside = Stream(), {}, []

    @contextmanager
    def context(stream):
        inside.append(stream)
        yield
        inside.pop()

    def copy(_, copies, is_waited_for):
        assert not is_waited_for
        for target, source in copies:
            target.copy_(source)
            is_host = target.numel() == target.untyped_storage().nbytes()  # else a part of a buffer
            name = "write" if is_host else "fetch"
            inside[-1].do(f"{name} {int(target.view(-1)[0]) // 10}", log)

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: current)
    monkeypatch.setattr(torch.cuda, "stream", context)
    monkeypatch.setattr(CudaCopyStream, "_copy", copy)
    monkeypatch.setattr(offload, "lane_of", CudaCopyStream)
    return current, log


@pytest.mark.parametrize("is_written", [True, False])
def test_copies_and_work_are_ordered_where_they_share_memory_and_only_there(streams, is_written):
    current, log = streams
    current.do("earlier work in the memory of the buffers", log)
    # Job i has the bytes 10 i, and makes them 10 i + 1; of 600 bytes, more than tensors in a buffer are padded by.
    host = [torch.full((600,), 10 * i, dtype=torch.uint8) for i in range(6)]

    def job(index):
        def run(staged):
            assert staged[0].unique().tolist() == [10 * index]
            staged[0].add_(1)
            current.do(f"work {index}", log)

        return OffloadTask(torch.device("cpu"), run, **{"written" if is_written else "read": [host[index]]})

    StateOffload("cpu").run([job(i) for i in range(6)])
    current.do("later work in the memory of the buffers", log)
    assert [int(tensor[0]) for tensor in host] == [10 * i + is_written for i in range(6)]
    for i in range(6):
        assert "earlier work in the memory of the buffers" in log[f"fetch {i}"]
        assert f"fetch {i}" in log[f"work {i}"]
        assert f"fetch {i}" in log["later work in the memory of the buffers"]
        if is_written:
            assert f"work {i}" in log[f"write {i}"]
            assert f"write {i}" in log["later work in the memory of the buffers"]
        if i >= 2:  # the buffer of job i - 2
            assert f"work {i - 2}" in log[f"fetch {i}"]
            assert not is_written or f"write {i - 2}" in log[f"fetch {i}"]
        if i >= 1:  # what makes it fast
            assert f"work {i - 1}" not in log[f"fetch {i}"]
            assert f"write {i - 1}" not in log[f"work {i}"]


def test_copies_of_a_later_run_come_after_those_of_an_earlier_one(streams):
    _, log = streams
    host = torch.full((600,), 30, dtype=torch.uint8)
    staged_state = StateOffload("cpu")
    staged_state.run([OffloadTask(torch.device("cpu"), lambda staged: staged[0].add_(20), written=[host])])
    assert log["write 5"] >= {"fetch 3"}
    staged_state.run([OffloadTask(torch.device("cpu"), lambda _: None, read=[host])])
    assert log["fetch 5"] >= {"fetch 3", "write 5"}
