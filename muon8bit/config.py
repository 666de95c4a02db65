"""Names, defaults and modes. Every number carries its unit and its source."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._values import is_choice, shown
from .choices import (
    ADJUST_LR as ADJUST_LR,
    ALGORITHMS as ALGORITHMS,
    BACKENDS as BACKENDS,
    BITS as BITS,
    BLOCK_SIZES as BLOCK_SIZES,
    CODEBOOKS as CODEBOOKS,
    EPS_FORMS as EPS_FORMS,
    ON_NONFINITE as ON_NONFINITE,
    PARAM_ROUNDINGS as PARAM_ROUNDINGS,
    RESCALES as RESCALES,
    ROUTERS as ROUTERS,
    ROUTINGS as ROUTINGS,
    SECOND_MOMENTS as SECOND_MOMENTS,
    SPLIT_HEADS as SPLIT_HEADS,
    STATE_DEVICES as STATE_DEVICES,
    ZERO_SLICES as ZERO_SLICES,
    AdjustLR as AdjustLR,
    Algorithm as Algorithm,
    Backend as Backend,
    Bits as Bits,
    Codebook as Codebook,
    EpsForm as EpsForm,
    OnNonfinite as OnNonfinite,
    ParamRounding as ParamRounding,
    Rescale as Rescale,
    Routers as Routers,
    Routing as Routing,
    SecondMomentKind as SecondMomentKind,
    SplitHeads as SplitHeads,
    StateDevice as StateDevice,
    ZeroSlices as ZeroSlices,
)

# The rules by which `param_groups` routes: those of the newest release.
DEFAULT_ROUTING: Routing = "0.2"

# One fp32 scale per 2048 elements, the 8-bit Muon paper's choice (arXiv 2509.23106, as reported by third parties).
DEFAULT_BLOCK_SIZE = 2048
# Under this many columns a scale per row costs more than half a byte per element: the state stays fp32.
MIN_QUANTIZED_COLUMNS = 8

# AdamW's moments in 8 bits, as bitsandbytes' AdamW8bit has them: elements that share one fp32 scale, in the order of
# indices; under so many elements both moments stay fp32.
ADAMW8_BLOCK_SIZE = 256
MIN_ADAMW8_ELEMENTS = 4096

# torch.optim.Muon's defaults. `lr` is the RMS (match_rms_adamw: 0.2 of it) or spectral norm of one update;
# `weight_decay` is per unit of lr; `eps` is a lower bound of the Frobenius norm that divides the momentum.
DEFAULT_LR = 1e-3
DEFAULT_WEIGHT_DECAY = 0.1
DEFAULT_MOMENTUM = 0.95
DEFAULT_EPS = 1e-7
DEFAULT_NS_STEPS = 5
# NorMuon's (arXiv 2510.05491). The second moment's eps is that of most implementations, in the unit of O.
DEFAULT_BETA2 = 0.95
DEFAULT_SECOND_MOMENT_EPS = 1e-8

# AdamW part: the betas used with Muon for language models (Moonlight, arXiv 2502.16982, and the 8-bit Muon
# team's own ladder); eps is torch.optim.AdamW's.
DEFAULT_ADAMW_BETAS = (0.9, 0.95)
DEFAULT_ADAMW_EPS = 1e-8
DEFAULT_ADAMW_BITS: Bits = 32

# Bytes that a step may allocate at once beyond its state; a single larger matrix exceeds it.
DEFAULT_WORKSPACE_BYTES = 512 * 2**20
# Less makes no sense: on a CPU the passes over the momentum work on pieces of up to 10 MiB.
MIN_WORKSPACE_BYTES = 32 * 2**20
# Seconds that a rank waits for the others inside a step.
DEFAULT_STEP_TIMEOUT = 60.0
MAX_STEP_TIMEOUT = 10**6
# Of the workspace, for sums, norms and tables of addresses.
SMALL_WORKSPACE_BYTES = 2**20

# Keys of `optimizer.state[param]`: part of the checkpoint format, one dtype each.
LINEAR_CODES_KEY = "momentum_linear8"  # int8, the parameter's shape
DYNAMIC_CODES_KEY = "momentum_dynamic8"  # uint8, the parameter's shape
SCALES_KEY = "momentum_scales"  # fp32, [..., rows, ceil(cols / block_size)]
BUFFER_KEY = "momentum_buffer"  # fp32, the parameter's shape; bits=32, or too few columns
# fp32, [..., rows, pieces] or [..., pieces, cols]; the parameter's shape with "element" and bits=32 or few columns.
SECOND_MOMENT_KEY = "second_moment"
SECOND_CODES_KEY = "second_moment_sqrt8"  # uint8, the parameter's shape: linear codes of the square root
SECOND_SCALES_KEY = "second_moment_scales"  # fp32, [..., rows, blocks]
SECOND_KEYS = (SECOND_MOMENT_KEY, SECOND_CODES_KEY, SECOND_SCALES_KEY)
EXP_AVG_KEY = "exp_avg"  # fp32, the parameter's shape; adamw_bits=32, or too few elements
EXP_AVG_SQ_KEY = "exp_avg_sq"
EXP_AVG_CODES_KEY = "exp_avg_dynamic8"  # uint8, the parameter's shape; adamw_bits=8: codes of the signed dynamic map
EXP_AVG_SQ_CODES_KEY = "exp_avg_sq_dynamic8"  # uint8, the parameter's shape: codes of the unsigned dynamic map
EXP_AVG_SCALES_KEY = "exp_avg_scales"  # fp32, [..., cols / 256] where that is whole, else [ceil(elements / 256)]
EXP_AVG_SQ_SCALES_KEY = "exp_avg_sq_scales"
STEP_KEY = "step"  # fp32, 0-d: AdamW's steps so far
# Other keys are those of wrappers, which keep what they need beside ours.
STATE_KEYS = frozenset(
    {
        *(LINEAR_CODES_KEY, DYNAMIC_CODES_KEY, SCALES_KEY, BUFFER_KEY, STEP_KEY, EXP_AVG_KEY, EXP_AVG_SQ_KEY),
        *(EXP_AVG_CODES_KEY, EXP_AVG_SQ_CODES_KEY, EXP_AVG_SCALES_KEY, EXP_AVG_SQ_SCALES_KEY),
        *SECOND_KEYS,
    }
)


def check_running(
    *,
    param_rounding: Any,
    on_nonfinite: Any,
    ns_dtype: Any,
    backend: Any,
    workspace_bytes: Any,
    state_device: Any,
    step_timeout: Any,
    shard_state: Any,
) -> None:
    """Check what the optimizer as a whole is asked for, besides its groups.

    Raises:
        ValueError: names the argument and what it may be.
    """
    if not is_choice(param_rounding, PARAM_ROUNDINGS):
        raise ValueError(f"param_rounding must be one of {PARAM_ROUNDINGS}, not {shown(param_rounding)}")
    if not is_choice(on_nonfinite, ON_NONFINITE):
        raise ValueError(f"on_nonfinite must be one of {ON_NONFINITE}, not {shown(on_nonfinite)}")
    if not is_choice(ns_dtype, (None, torch.float32, torch.float16, torch.bfloat16)):
        raise ValueError(
            f"ns_dtype must be None, torch.float32, torch.float16 or torch.bfloat16, not {shown(ns_dtype)}"
        )
    if not is_choice(backend, (None, *BACKENDS)):
        raise ValueError(f"backend must be None, 'reference' or 'triton', not {shown(backend)}")
    if not isinstance(shard_state, bool):
        raise ValueError(f"shard_state must be True or False, not {shown(shard_state)}")
    least = MIN_WORKSPACE_BYTES
    if type(workspace_bytes) is not int or workspace_bytes < least:
        raise ValueError(f"workspace_bytes must be an int of at least {least}, not {shown(workspace_bytes)}")
    is_number = isinstance(step_timeout, int | float) and not isinstance(step_timeout, bool)
    if not is_number or not 0 < step_timeout < MAX_STEP_TIMEOUT:  # NaN is not
        raise ValueError(f"step_timeout must be seconds > 0 and < {MAX_STEP_TIMEOUT}, not {shown(step_timeout)}")
    if not is_choice(state_device, (None, *STATE_DEVICES)):
        raise ValueError(
            "state_device must be None, which keeps the state with the parameters, or 'cpu', not "
            f"{shown(state_device)}: it comes from host memory to the device for the step, and from nowhere else"
        )


# Largest magnitudes, squares, a count: never under zero.
_NOT_NEGATIVE = (
    *(SCALES_KEY, EXP_AVG_SCALES_KEY, EXP_AVG_SQ_SCALES_KEY, EXP_AVG_SQ_KEY, STEP_KEY),
    *(SECOND_MOMENT_KEY, SECOND_SCALES_KEY),
)


def why_damaged(key: str, value: Tensor, num_steps: float = 0) -> str:
    """Return what no step leaves in a tensor of the state, or nothing. Takes no memory for elements.

    The dynamic maps use all of their 256 codes; of the linear one -128 would be -1.008 of the scale.

    Args:
        key: one of `config.STATE_KEYS`.
        value: dense, with values, of the key's dtype.
        num_steps: AdamW's; from the first on no 8-bit second moment has the code 0.
    """
    if value.numel() == 0:
        return ""
    low, high = value.aminmax()
    if value.is_floating_point() and not (low.isfinite() and high.isfinite()):
        return "NaN or Inf"
    if key in _NOT_NEGATIVE and low < 0:
        return f"the negative number {low.item():g}"
    if key == STEP_KEY and low != low.floor():
        return f"{low.item():g}, which is no number of steps"
    if key == LINEAR_CODES_KEY and low < -127:
        return "the code -128, which is none of the linear codebook's"
    if key == EXP_AVG_SQ_CODES_KEY and num_steps > 0 and low == 0:
        return "the code 0, by which a step would be divided, and which it never stores"
    return ""
