"""Ways between the host and a device that are the host itself, to put staged state through the real pipeline."""

from __future__ import annotations

import pytest
import torch

from muon8bit.step import offload


class Early(offload.CopyStream):
    """A stream whose copies are done at once, as early as CUDA may do them.

    What was written back is lost on the device, so that whoever still used it would see.
    """

    def write(self, copies):
        super().write(copies)
        for _, source in copies:
            source.view(-1).view(torch.uint8).fill_(0xAB)


class Late(offload.CopyStream):
    """A stream of copies that are done as late as CUDA may do them.

    When the work waits for one, all before it are done, the rest when the host waits.
    """

    def __init__(self, device):
        super().__init__(device)
        self.pending = []

    def fetch(self, copies):
        self.pending.append(copies)
        return copies

    def arrive(self, fetched):
        while any(copies is fetched for copies in self.pending):
            self._copy(self.pending.pop(0))

    def write(self, copies):
        self.pending.append(copies)

    def synchronize(self):
        while self.pending:
            self._copy(self.pending.pop(0))


class Recorded(offload.CopyStream):
    """Keeps what happened, and where the buffers were."""

    def __init__(self, device):
        super().__init__(device)
        self.events, self.buffers, self.num_fetched = [], [], 0

    def begin(self):
        self.events.append("begin")

    def fetch(self, copies):
        super().fetch(copies)
        self.events.append(f"fetch {self.num_fetched}")
        self.buffers.append(copies[0][0].untyped_storage())
        self.num_fetched += 1
        return self.num_fetched - 1

    def arrive(self, fetched):
        self.events.append(f"arrive {fetched}")

    def write(self, copies):
        super().write(copies)
        self.events.append("write")

    def end(self):
        self.events.append("end")


@pytest.fixture
def force(monkeypatch):
    """Return `force(Lane)`: state is copied by such a lane, which it returns, for parameters on the CPU too."""

    def forced(kind):
        lane = kind(torch.device("cpu"))
        monkeypatch.setattr(offload, "lane_of", lambda _: lane)
        return lane

    return forced
