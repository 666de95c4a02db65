"""Second moments in whole steps: state by hand count, splits and stacks as matrices of their own, dead matrices."""

from __future__ import annotations

import pytest
import torch

from muon8bit import AdaMuon8bit, Muon8bit, NorMuon8bit, param_groups

ROW = {"second_moment": "row", "rescale": "rms"}
ELEMENT = {"second_moment": "element", "rescale": "rms", "sign_momentum": True, "nesterov": False}
KINDS = {"row": ROW, "shape": {"second_moment": "shape", "rescale": "keep"}, "element": ELEMENT}


def parameter(shape, dtype=torch.float32, seed=0):
    return torch.nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype) * 0.02)


def steps(optimizer, params, num=3, seed=5):
    """Take steps with random gradients, the same for parameters of the same numbers of elements."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(num):
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)
        optimizer.step()


@pytest.mark.parametrize(
    ("options", "shape", "expected"),
    [
        (ROW, (24, 96), {"second_moment": (24, 1)}),
        (ROW, (3, 24, 96), {"second_moment": (3, 24, 1)}),
        ({**ROW, "flatten": True}, (24, 4, 24), {"second_moment": (24, 1)}),
        ({**ROW, "split_sizes": (8, 16)}, (24, 96), {"second_moment": (24, 1)}),
        ({**ROW, "split_sizes": (32, 64), "split_dim": -1}, (24, 96), {"second_moment": (24, 2)}),
        (KINDS["shape"], (24, 96), {"second_moment": (1, 96)}),
        (KINDS["shape"], (96, 24), {"second_moment": (96, 1)}),
        ({**KINDS["shape"], "split_sizes": (8, 16)}, (2, 24, 96), {"second_moment": (2, 2, 96)}),
        (ELEMENT, (24, 96), {"second_moment_sqrt8": (24, 96), "second_moment_scales": (24, 2)}),
        (
            {**ELEMENT, "split_sizes": (32, 64), "split_dim": -1},
            (24, 96),
            {"second_moment_sqrt8": (24, 96), "second_moment_scales": (24, 2)},
        ),
        ({**ELEMENT, "bits": 32}, (24, 96), {"second_moment": (24, 96)}),
        (ELEMENT, (96, 4), {"second_moment": (96, 4)}),
    ],
)
def test_state_by_hand_count(options, shape, expected):
    param = parameter(shape)
    optimizer = Muon8bit([{"params": [param], "block_size": 64, **options}])
    steps(optimizer, [param], 1)
    state = optimizer.state[param]
    found = {key: tuple(value.shape) for key, value in state.items() if not key.startswith("momentum")}
    assert found == expected
    assert {k: tuple(v.shape) for k, v in optimizer.empty_state()[param].items()} == {
        k: tuple(v.shape) for k, v in state.items()
    }


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_stacks_and_pieces_are_matrices_of_their_own(kind, dtype):
    """Pieces of rows and the matrices of a stack give the bits of separate parameters; "shape" is the whole's."""
    options = {**KINDS[kind], "bits": 8, "block_size": 64}
    whole = parameter((2, 48, 80), dtype)
    parts = [torch.nn.Parameter(whole.detach()[e, a:b].clone()) for e in range(2) for a, b in ((0, 16), (16, 48))]
    of_whole = Muon8bit([{"params": [whole], "split_sizes": (16, 32), **options}])
    of_parts = Muon8bit([{"params": parts, **options}])
    generator = torch.Generator().manual_seed(2)
    for _ in range(3):
        whole.grad = torch.randn(whole.shape, generator=generator).to(dtype)
        for part, grad in zip(parts, [g for e in whole.grad for g in e.split((16, 32))], strict=True):
            part.grad = grad.clone()
        of_whole.step()
        of_parts.step()
    for part, piece in zip(parts, [g for e in whole.detach() for g in e.split((16, 32))], strict=True):
        assert torch.equal(part, piece)


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_of_columns_are_matrices_of_their_own(kind):
    options = {**KINDS[kind], "bits": 32, "block_size": 64}
    whole = parameter((40, 112))
    parts = [torch.nn.Parameter(part.clone()) for part in whole.detach().split((48, 64), 1)]
    of_whole = Muon8bit([{"params": [whole], "split_sizes": (48, 64), "split_dim": -1, **options}])
    of_parts = Muon8bit([{"params": parts, **options}])
    for step in range(3):
        whole.grad = torch.randn(whole.shape, generator=torch.Generator().manual_seed(step))
        for part, grad in zip(parts, whole.grad.split((48, 64), 1), strict=True):
            part.grad = grad.clone()
        of_whole.step()
        of_parts.step()
    for part, piece in zip(parts, whole.detach().split((48, 64), 1), strict=True):
        torch.testing.assert_close(part.detach(), piece, rtol=0.0, atol=2e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [8, 32])
def test_a_dead_matrix_only_decays_and_its_state_stays_finite(kind, bits):
    param = parameter((40, 96))
    before = param.detach().clone()
    optimizer = Muon8bit([{"params": [param], "bits": bits, "second_moment_eps": 0.0, **KINDS[kind]}], lr=0.1)
    for _ in range(3):
        param.grad = torch.zeros_like(param)
        optimizer.step()
    assert torch.equal(param.detach(), before * (1 - 0.1 * 0.1) * (1 - 0.1 * 0.1) * (1 - 0.1 * 0.1))
    assert all(value.float().isfinite().all() for value in optimizer.state[param].values())
    steps(optimizer, [param])
    assert param.isfinite().all()


@pytest.mark.parametrize("bits", [8, 32])
def test_the_first_update_of_adamuon_is_a_fifth_of_the_signs(bits):
    """sqrt(V) is |O| times a constant at first, and the rescaling cancels that."""
    param = parameter((64, 160))
    optimizer = Muon8bit(
        [{"params": [param], "second_moment_eps": 0.0, **ELEMENT}], lr=1.0, weight_decay=0.0, bits=bits
    )
    param.data.zero_()
    steps(optimizer, [param], 1)
    assert (param.detach().abs() - torch.tensor(0.2)).abs().max() <= 2 * 2.0**-26  # units in the last place of 0.2


@pytest.mark.parametrize("of", [NorMuon8bit, AdaMuon8bit])
def test_presets_fill_groups_and_what_contradicts_them_is_refused(of):
    for preset, keys in of.presets.items():
        param = parameter((16, 32))
        optimizer = of([param], preset=preset)
        assert keys.items() <= optimizer.param_groups[0].items()
        for options in ({"nesterov": not keys["nesterov"]}, {"beta2": 0.5}):
            with pytest.raises(ValueError, match=rf"{next(iter(options))}=.*contradicts preset='{preset}'"):
                of([param], preset=preset, **options)
            with pytest.raises(ValueError, match=rf"group 0: {next(iter(options))}=.*contradicts"):
                of([{"params": [param], **options}], preset=preset)
    with pytest.raises(ValueError, match=r"beta2=.*contradicts"):
        of([parameter((8, 8))], beta2=torch.tensor([0.9, 0.9]))
    with pytest.raises(ValueError, match="preset must be one of paper"):
        of([parameter((8, 8))], preset="papre")


@pytest.mark.parametrize("of", [NorMuon8bit, AdaMuon8bit])
def test_a_checkpoint_of_another_preset_is_refused_and_a_scheduled_momentum_is_loaded(of):
    saved, running = (of([parameter((16, 32))], preset=preset) for preset in ("official", "paper"))
    before = dict(running.param_groups[0])
    with pytest.raises(ValueError, match=r"group 0: saved with .*True, preset='paper' .*preset='official'"):
        running.load_state_dict(saved.state_dict())
    assert running.param_groups[0] == before
    second = NorMuon8bit if of is AdaMuon8bit else AdaMuon8bit
    with pytest.raises(ValueError, match="group 0: saved with second_moment="):
        second([parameter((16, 32))]).load_state_dict(saved.state_dict())
    other = of([parameter((16, 32))], preset="official")
    saved.param_groups[0]["momentum"] = 0.85
    other.load_state_dict(saved.state_dict())
    assert other.param_groups[0]["momentum"] == 0.85


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [8, 32])
def test_a_resumed_run_is_the_same_to_the_bit(kind, bits, tmp_path):
    def made():
        params = [parameter((40, 96)), parameter((2, 24, 64), torch.bfloat16)]
        return params, Muon8bit([{"params": params, "bits": bits, "block_size": 64, **KINDS[kind]}])

    params, optimizer = made()
    steps(optimizer, params)
    torch.save([optimizer.state_dict(), *(param.detach() for param in params)], tmp_path / "saved.pt")
    others, resumed = made()
    saved, *values = torch.load(tmp_path / "saved.pt", weights_only=True)
    for param, value in zip(others, values, strict=True):
        param.data.copy_(value)
    resumed.load_state_dict(saved)
    steps(optimizer, params, seed=9)
    steps(resumed, others, seed=9)
    for param, other in zip(params, others, strict=True):
        assert torch.equal(param, other)
        for key, value in optimizer.state[param].items():
            assert torch.equal(value, resumed.state[other][key])


def test_presets_take_the_groups_of_a_model():
    """A preset with a size of its own whatever `adjust_lr_fn` they say; another tells how to build them."""
    model = torch.nn.Sequential(torch.nn.Linear(16, 32, bias=False), torch.nn.Linear(32, 16, bias=False))
    groups = param_groups(model, lr=1e-3, weight_decay=0.1)
    for of in (NorMuon8bit, AdaMuon8bit):
        steps(of(param_groups(model, lr=1e-3, weight_decay=0.1)), list(model.parameters()), 1)
    with pytest.raises(ValueError, match=r"param_groups\(\.\.\., adjust_lr_fn='spectral', adamw_lr=\.\.\.\)"):
        NorMuon8bit(groups, preset="dion")
    spectral = param_groups(model, lr=1e-2, weight_decay=0.1, adjust_lr_fn="spectral", adamw_lr=1e-3)
    steps(NorMuon8bit(spectral, preset="dion"), list(model.parameters()), 1)
