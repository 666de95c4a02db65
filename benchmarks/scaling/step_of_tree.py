"""Python of a step of a working tree of any age, with nothing computed: a script that `host_time` runs in each tree.

    python benchmarks/scaling/step_of_tree.py NUM_STEPS NUM_LAYERS [SETTING ...] FILE.json    # PYTHONPATH is the tree

Parameters, gradients and state of Llama-3.1-8B are on the meta device, which stands for an H100. Triton's launches,
Newton-Schulz, the flags of the gradients and what ranks send return at once: what is left is the host's. Only what
trees of every age have is imported from them.
"""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import triton
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

import muon8bit
from benchmarks.gpu.workloads import MODELS
from muon8bit import Muon8bit
from muon8bit.distributed import collectives
from muon8bit.orthogonalize import device_kind, orthogonalize
from muon8bit.step import nonfinite, phases

NUM_RANKS, WARM_UP = 8, 2
SETTINGS = ("one GPU", "FSDP 8", "DDP 8")
ROW_PARALLEL = (3, 6)  # places of the output and the down projection in a layer
MODEL = MODELS["Llama-3.1-8B"]
# Operations of torch that launch no kernel: views, and memory that is not written.
NO_KERNEL = (
    *("view", "empty", "new_empty", "detach", "select", "slice", "split", "alias", "squeeze", "unsqueeze", "unbind"),
    *("expand", "transpose", "as_strided"),
)


class Gradient(torch.Tensor):
    """A gradient that does not say that it has no values; operations give plain tensors."""

    is_meta = False
    __torch_function__ = torch._C._disabled_torch_function_impl


class NoCheck(nonfinite.GradientCheck):
    """Flags that nobody reads, as on CUDA, where they arrive while the next step goes on."""

    def __init__(self, found: Any, step: int, *, is_scaled: bool = False) -> None:
        self.step, self.is_scaled, self.advanced, self.is_pending = step, is_scaled, [], False
        self._flags = [flags.all() for _, flags in found]

    @property
    def is_asynchronous(self) -> bool:
        return True

    def skip(self, device: torch.device) -> torch.Tensor:  # noqa: ARG002
        return self._flags[0]

    def nonfinite_names(self) -> list[str]:
        return []


def quick_meta() -> torch.library.Library:
    """Return operations on the meta device that take about as long as a launch: torch's own are Python, 20 to 300 us.

    They give a tensor of the first argument's shape, or of the shape that the arguments say.
    """

    def like(first: Any, *_: Any, **__: Any) -> torch.Tensor:
        return torch.empty(first.shape, dtype=first.dtype, device="meta")

    def truth(first: Any, *_: Any, **__: Any) -> torch.Tensor:
        return torch.empty(first.shape, dtype=torch.bool, device="meta")

    def cat(tensors: Any, dim: int = 0) -> torch.Tensor:
        shape = list(tensors[-1].shape)
        shape[dim] = sum(t.shape[dim] for t in tensors if t.ndim == len(shape))
        return torch.empty(shape, dtype=tensors[-1].dtype, device="meta")

    def stack(tensors: Any, dim: int = 0) -> torch.Tensor:
        assert dim == 0
        return torch.empty((len(tensors), *tensors[0].shape), dtype=tensors[0].dtype, device="meta")

    def summed(first: Any, dims: Any, *_: Any, out: Any = None, dtype: Any = None, **__: Any) -> torch.Tensor:
        kept = [n for dim, n in enumerate(first.shape) if dim not in [d % first.ndim for d in dims]]
        return torch.empty(kept, dtype=dtype or first.dtype, device="meta") if out is None else out

    library = torch.library.Library("aten", "IMPL")
    of_all = {"sqrt": like, "clamp": like, "mul.Tensor": like, "add.Tensor": like, "abs": like, "cat": cat}
    of_all |= {"eq.Scalar": truth, "ne.Scalar": truth, "eq.Tensor": truth, "stack": stack}
    of_all |= {"sum.dim_IntList": summed, "sum.IntList_out": summed}
    of_all |= {"all": lambda first: torch.empty((), dtype=torch.bool, device=first.device)}
    for name, function in of_all.items():
        library.impl(name, function, "Meta")
    return library


class KernelCounter(TorchDispatchMode):
    """Counts what torch itself would launch on the device."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        is_on_device = any(isinstance(t, torch.Tensor) and t.is_meta for t in (result, *args))
        name = func.overloadpacket.__name__
        if is_on_device and not name.removeprefix("_").startswith(NO_KERNEL):
            self.found[name] += 1
        return result


def replace_everywhere(old: Any, new: Any) -> None:
    """Put another object wherever a module of the package has imported this one."""
    for name, module in list(sys.modules.items()):
        if name.startswith("muon8bit"):
            for key in [key for key, value in vars(module).items() if value is old]:
                setattr(module, key, new)


def stub(launches: list[str]) -> torch.library.Library:
    """Let the meta device stand for a GPU, whose kernels and messages do nothing, while what is returned lives."""
    from muon8bit_kernels import kernels_for
    from muon8bit_kernels.triton import kernels

    item = torch.Tensor.item  # older trees wait for the flag of the step where columns are cut
    torch.Tensor.item = lambda tensor: 0.0 if tensor.is_meta else item(tensor)  # type: ignore[method-assign]
    triton.JITFunction.run = lambda kernel, *_, **__: launches.append(kernel.fn.__name__)
    replace_everywhere(device_kind, lambda _: "cuda_sm90")
    replace_everywhere(kernels_for, lambda *_: kernels)
    replace_everywhere(orthogonalize, lambda X, *_: X)
    replace_everywhere(nonfinite.GradientCheck, NoCheck)
    phases.is_dry = lambda _: False  # type: ignore[attr-defined]

    def gather(self: Any, gathered: torch.Tensor, values: torch.Tensor, **_: Any) -> None:
        if not gathered.is_meta:
            gathered.view(self.num_ranks, -1).copy_(values)

    collectives.Transport.gather_into = gather  # type: ignore[method-assign]
    done = mock.Mock(wait=lambda: None)
    for name in ("alltoall_base", "_allgather_base"):  # of meta tensors
        setattr(dist.ProcessGroup, name, lambda *_: done)
    return quick_meta()


def _tensor_parallel(rows: int, cols: int, mesh: Any, dim: int) -> torch.nn.Parameter:
    """Return a parameter with its gradient, of which this rank has a part of the rows (0) or columns (1)."""
    shape = (rows, cols // NUM_RANKS) if dim else (rows // NUM_RANKS, cols)
    value, grad = (torch.empty(shape, dtype=torch.bfloat16, device="meta") for _ in range(2))
    of_param, of_grad = (DTensor.from_local(t, mesh, [Shard(dim)], run_check=False) for t in (value, grad))
    of_grad._local_tensor = grad.as_subclass(Gradient)
    param = torch.nn.Parameter(of_param)
    param.grad = of_grad
    return param


def make(setting: str, num_layers: int) -> Muon8bit:
    """Return the optimizer of a setting, its parameters with gradients."""
    params = []
    mesh = init_device_mesh("cpu", (NUM_RANKS,))
    for number, (rows, cols) in enumerate(MODEL.linears() * num_layers):
        if setting == "TP 8":
            params.append(_tensor_parallel(rows, cols, mesh, dim=int(number % len(MODEL.linears()) in ROW_PARALLEL)))
            continue
        here = rows // NUM_RANKS if setting == "FSDP 8" else rows
        value, grad = (torch.empty(here, cols, dtype=torch.bfloat16, device="meta") for _ in range(2))
        param = value
        if setting == "FSDP 8":
            param, spread = (DTensor.from_local(t, mesh, [Shard(0)], run_check=False) for t in (value, grad))
            spread._local_tensor = grad.as_subclass(Gradient)
        else:
            spread = grad.as_subclass(Gradient)
        params.append(torch.nn.Parameter(param))
        params[-1].grad = spread
    return Muon8bit(params, process_group=dist.group.WORLD if setting == "DDP 8" else None)


def main(num_steps: int, num_layers: int, settings: Sequence[str], out: Path) -> None:
    """Write the CPU time of each step in ms, and the launches of one, by setting."""
    torch.set_num_threads(1)
    launches = list[str]()
    library = stub(launches)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=NUM_RANKS)
    found: dict[str, Any] = {"package": str(Path(muon8bit.__file__).parents[1])}
    for setting in settings:
        optimizer, times = make(setting, num_layers), list[float]()
        for step in range(WARM_UP + num_steps):
            start = time.process_time()
            optimizer.step()
            times += [1e3 * (time.process_time() - start)] if step >= WARM_UP else []
        launches.clear()
        with KernelCounter() as counter:
            optimizer.step()
        found[setting] = {"ms": times, "triton": dict(Counter(launches)), "torch": dict(counter.found)}
    out.write_text(json.dumps(found))
    del library


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:-1] or SETTINGS, Path(sys.argv[-1]))
