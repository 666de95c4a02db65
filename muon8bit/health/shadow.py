"""Momentum in fp32 beside that of the optimizer, averaged from the same gradients by the same rule."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..optimizer import Muon8bit
from ..step import clipping
from ..step.dense import with_memory
from ..step.group_options import MuonOptions
from ..step.matrix_batches import MatrixBatch, ParamMatrices, matrices_of
from ..step.momentum import Momentum, MomentumFormat
from .samples import WatchedMatrix


@dataclass(frozen=True)
class MomentumPair:
    """One matrix after one step, by both momenta; all tensors are [rows, cols].

    Attributes:
        u, u8: what Newton-Schulz gets of the fp32 momentum, and got of the 8-bit one: fp32, without signs.
        m, m8: the momenta after the step, fp32, decoded.
        codes: those of m8.
        format: of m8.
        options: the group's.
    """

    u: Tensor
    u8: Tensor
    m: Tensor
    m8: Tensor
    codes: Tensor
    format: MomentumFormat
    options: MuonOptions


class Shadow:
    """Momentum of one matrix in fp32. It begins as the 8-bit one is before the first step that it sees.

    Args:
        of: the matrix.

    Attributes:
        m: fp32 [rows, cols]; None before that step.
    """

    def __init__(self, of: WatchedMatrix) -> None:
        self.of = of
        self.m: Tensor | None = None
        self._m8: Tensor | None = None  # before a step that is measured

    def param(self, optimizer: Muon8bit) -> Tensor:
        """Return the parameter that is in the group now: wrappers put others there."""
        param: Tensor = optimizer.param_groups[self.of.group_index]["params"][self.of.param_index]
        return param

    def begin_step(self, optimizer: Muon8bit, *, is_measured: bool) -> None:
        """Keep what a step overwrites and its measurement, or the first average, needs: the 8-bit momentum."""
        self._m8 = None
        if not is_measured and self.m is not None:
            return
        param, options = self.param(optimizer), self._options(optimizer)
        member = self._matrix(optimizer, param, param, options)
        m8 = torch.zeros(self.of.rows, self.of.cols, dtype=torch.float32, device=param.device)
        if member is not None:
            m8.copy_(self._decoded(member, options))
        if self.m is None:
            self.m = m8.clone()
        if is_measured:
            self._m8 = m8

    def finish_step(self, optimizer: Muon8bit, skip: Tensor | None) -> MomentumPair | None:
        """Average the gradient of the step that was taken; return what is to be compared if the step is measured.

        Args:
            optimizer: after the step, its gradients as the step left them: by then they are clipped in place.
            skip: None, or fp32 0-d on the parameter's device; where it is not 0, the step changed nothing.
        """
        param, m, m8, self._m8 = self.param(optimizer), self.m, self._m8, None
        if param.grad is None or m is None:
            return None
        options = self._options(optimizer).on(param.device)
        member = self._matrix(optimizer, param, param.grad, options)
        if member is None:
            return None
        # Clipped already; what is left is the sign, and the scale of a GradScaler.
        member, _ = clipping.with_factor(member, replace(options, clip_matrix_norm=None))
        g = self._columns(MatrixBatch([member], options).grads()[0][0], options).float() * (1 - options.momentum)
        new = (m * options.momentum).add_(g)
        for flag in (skip, None if member.idle is None else member.idle[0]):
            new = new if flag is None else torch.where(flag == 0, new, m)
        self.m = new
        if m8 is None:
            return None
        u, u8 = new, m8.mul_(options.momentum).add_(g)
        if options.nesterov:
            u, u8 = ((value * options.momentum).add_(g) for value in (u, u8))
        codes = self._columns(member.momentum.codes[0].to(param.device), options)
        return MomentumPair(u, u8, new, self._decoded(member, options), codes, member.momentum.format, options)

    def _options(self, optimizer: Muon8bit) -> MuonOptions:
        """Return what the group says now; a scheduler may have written its momentum."""
        (options,) = optimizer._options([optimizer.param_groups[self.of.group_index]])
        assert isinstance(options, MuonOptions)
        return options

    def _matrix(self, optimizer: Muon8bit, param: Tensor, grad: Tensor, options: MuonOptions) -> ParamMatrices | None:
        """Return the matrix as the step sees it, one piece of rows of one matrix; None without a state."""
        state = optimizer.state.get(param)
        if not state:
            return None
        optimizer._offload.synchronize()
        grad = with_memory(grad) if grad._is_zerotensor() else grad
        momentum = Momentum.from_state(state, MomentumFormat.of(param.shape, *options.format))
        if param.ndim > 2 and not options.flatten:  # the others of the stack are not looked at
            number = slice(self.of.matrix, self.of.matrix + 1)
            momentum = momentum.as_matrices().rows(number, slice(None))
            place = torch.unravel_index(torch.tensor(self.of.matrix), param.shape[:-2])
            param, grad = (tensor[place].unsqueeze(0) for tensor in (param, grad))
        members = matrices_of(self.of.param_index, param, grad, momentum, options, None)
        return members[0 if options.row_splits is None else self.of.piece]

    def _decoded(self, member: ParamMatrices, options: MuonOptions) -> Tensor:
        """Return the 8-bit momentum of the matrix, fp32, on the gradient's device."""
        codes, scales, format = member.momentum
        device = member.grad.device
        momentum = Momentum(codes.to(device), None if scales is None else scales.to(device), format)
        if format.flatten:
            momentum = momentum._replace(format=replace(format, flatten=False))
        return self._columns(momentum.decode()[0], options)

    def _columns(self, matrix: Tensor, options: MuonOptions) -> Tensor:
        """Return the piece of a matrix [rows, ...] that is orthogonalized by itself, of pieces of columns."""
        if options.column_splits is None:
            return matrix
        piece: Tensor = matrix.split(options.column_splits, -1)[self.of.piece]
        return piece
