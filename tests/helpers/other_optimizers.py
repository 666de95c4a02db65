"""torch.optim.Muon beside an AdamW, and Muon8bit for the same parameters: what conversion goes between."""

import warnings

import torch

from helpers.state_dicts import SHAPES
from muon8bit import Muon8bit, convert_state_dict

MATRICES, OTHERS = ("a", "b"), ("embed", "bias")


def quietly(*args, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return convert_state_dict(*args, **options)


def torch_pair(params, order=MATRICES):
    muon = torch.optim.Muon([(n, params[n]) for n in order], lr=0.02, weight_decay=0.2)
    adamw = torch.optim.AdamW([(n, params[n]) for n in OTHERS], lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)
    return muon, adamw


def torch_params(seed=0):
    generator = torch.Generator().manual_seed(seed)
    names = (*MATRICES, *OTHERS)
    return {n: torch.nn.Parameter(torch.randn(SHAPES[n], generator=generator)) for n in names}


def torch_train(params, pair, steps, seed):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for param in params.values():
            param.grad = torch.randn(param.shape, generator=generator)
        for optimizer in pair:
            optimizer.step()


def ours_for(params, order=("b", "a", "bias", "embed"), **options):
    """Return a Muon8bit with its groups in another order than torch's pair."""
    muon, adamw = [n for n in order if n in MATRICES], [n for n in order if n in OTHERS]
    groups = [
        {"params": [(n, params[n]) for n in adamw[:1]], "algorithm": "adamw", "lr": 3.0},
        {"params": [(n, params[n]) for n in muon], "lr": 3.0},
        {"params": [(n, params[n]) for n in adamw[1:]], "algorithm": "adamw", "lr": 3.0},
    ]
    return Muon8bit(groups, **{"bits": 32, "ns_dtype": torch.bfloat16, **options})


def both(pair):
    return {"muon": pair[0].state_dict(), "adamw": pair[1].state_dict()}
