"""A state dict whose groups divide the parameters in another way: what an error says, and what conversion keeps."""

import re
import warnings

import pytest
import torch
from helpers.bitwise import assert_bitwise

from muon8bit import Muon8bit, convert_state_dict

SHAPES = {"l.0.w": (16, 40), "l.1.w": (16, 40), "embed": (10, 8), "l.0.bias": (6,), "l.1.bias": (6,)}
MATRICES = "l.0.w l.1.w"
LOW, HIGH = ({"algorithm": "adamw", "lr": lr} for lr in (0.25, 0.5))
WAY_OUT = "convert_state_dict(saved, like=optimizer), or build the groups as they were saved, by the same `patterns`"


def optimizer_of(*groups, steps=1, is_named=True, **options):
    """Groups are pairs of names, separated by blanks, and options."""
    params = {name: torch.nn.Parameter(torch.ones(shape)) for name, shape in SHAPES.items()}
    pairs = [([(name, params[name]) for name in names.split()], keys) for names, keys in groups]
    members = [{"params": named if is_named else [p for _, p in named], **keys} for named, keys in pairs]
    optimizer = Muon8bit(members, lr=0.125, **options)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        for param in params.values():
            param.grad = torch.randn(param.shape, generator=generator)
        optimizer.step()
    return optimizer


def scheduled(optimizer):
    """Halve every lr, as a scheduler does after a step."""
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    optimizer.step()
    schedule.step()


def states_of(optimizer):
    """Name -> state."""
    names = [name for group in optimizer.param_groups for name in group["param_names"]]
    params = [param for group in optimizer.param_groups for param in group["params"]]
    return {name: optimizer.state.get(param, {}) for name, param in zip(names, params, strict=True)}


def told(convert):
    """What a function returns, and its warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = convert()
    return result, [str(warning.message) for warning in caught]


@pytest.mark.parametrize(
    ("saved", "here", "words"),
    [
        (
            [(MATRICES, {}), ("embed", HIGH), ("l.0.bias l.1.bias", LOW)],
            [(MATRICES, {}), ("embed l.0.bias", LOW), ("l.1.bias", LOW)],
            "2 parameters in other groups than this optimizer: embed (saved: adamw, lr=0.5; here: adamw, lr=0.25), "
            "l.1.bias (adamw with equal options, but beside other parameters)",
        ),
        (
            [(MATRICES, {}), ("l.0.bias l.1.bias", LOW), ("embed", HIGH)],
            [(MATRICES, {}), ("l.0.bias l.1.bias embed", LOW)],
            "1 parameter in another group than this optimizer: embed (saved: adamw, lr=0.5; here: adamw, lr=0.25)",
        ),
        (
            [("l.1.w", {"bits": 32}), ("l.0.w", {}), ("embed l.0.bias l.1.bias", LOW)],
            [(MATRICES, {}), ("embed l.0.bias l.1.bias", LOW)],
            "(saved: muon, bits=32; here: muon, bits=8)",
        ),
        (
            [(MATRICES, {}), ("embed", LOW), ("l.0.bias l.1.bias", {**LOW, "betas": [0.5, 0.75]})],
            [(MATRICES, {}), ("embed l.0.bias l.1.bias", LOW)],
            "l.{0,1}.bias x2 (saved: adamw, betas=(0.5, 0.75); here: adamw, betas=(0.9, 0.95))",
        ),
        (
            [(MATRICES, {}), ("embed l.0.bias l.1.bias", HIGH)],
            [(MATRICES + " embed", {}), ("l.0.bias l.1.bias", HIGH)],
            "embed (saved: adamw, lr=0.5; here: muon, lr=0.125)",
        ),
        (
            [(MATRICES, {}), ("embed", LOW), ("l.0.bias l.1.bias", HIGH)],
            [("l.0.bias", LOW), (MATRICES, {}), ("embed l.1.bias", LOW)],
            "l.1.bias (saved: adamw, lr=0.5; here: adamw, lr=0.25)",
        ),
    ],
)
def test_parameters_in_other_groups_are_told_with_what_differs_and_the_way_out(saved, here, words):
    state_dict, running = optimizer_of(*saved).state_dict(), optimizer_of(*here, steps=0)
    with pytest.raises(ValueError, match=re.escape(words)) as refused:
        running.load_state_dict(state_dict)
    assert WAY_OUT in str(refused.value)
    assert not running.state


def test_groups_in_another_order_are_told():
    groups = [(MATRICES, {}), ("embed", LOW), ("l.0.bias l.1.bias", HIGH)]
    saved, running = optimizer_of(*groups), optimizer_of(*groups[::-1], steps=0)
    with pytest.raises(
        ValueError, match=r"another order: l\.0\.bias is in its group 2, here in group 0: take "
    ) as refused:
        running.load_state_dict(saved.state_dict())
    assert WAY_OUT in str(refused.value)
    running.load_state_dict(convert_state_dict(saved.state_dict(), like=running))
    assert [group["lr"] for group in running.param_groups] == [0.5, 0.25, 0.125]


def test_a_scheduler_between_them_makes_no_difference_of_lr():
    saved = optimizer_of((MATRICES, {}), ("embed", HIGH), ("l.0.bias l.1.bias", HIGH))
    scheduled(saved)
    with pytest.raises(ValueError, match=r"adamw with equal options, but beside other parameters"):
        optimizer_of((MATRICES, {}), ("embed l.0.bias l.1.bias", HIGH)).load_state_dict(saved.state_dict())


def test_layers_of_one_kind_are_one_entry_of_the_error():
    saved = optimizer_of((MATRICES, {}), ("embed l.0.bias l.1.bias", HIGH)).state_dict()
    running = optimizer_of((MATRICES, {}), ("embed", HIGH), ("l.0.bias l.1.bias", LOW))
    saved["param_groups"][1]["lr"] = torch.tensor(0.5)
    saved["param_groups"][1]["param_names"] = ["l.2.bias", "l.0.bias", "l.1.bias"]
    running.param_groups[1]["param_names"] = ["l.2.bias"]
    with pytest.raises(ValueError, match=r"l\.\{0,1\}\.bias x2 \(saved: adamw, lr=0\.5; here: adamw, lr=0\.25\): take"):
        running.load_state_dict(saved)


@pytest.mark.parametrize("is_named", [True, False])
def test_another_model_is_told_by_the_first_name_that_one_side_lacks(is_named):
    saved = optimizer_of((MATRICES, {}), ("embed l.0.bias", LOW), is_named=is_named).state_dict()
    for here, words in (
        ([(MATRICES, {}), ("embed l.0.bias l.1.bias", LOW)], "2 parameters saved, 3 here (l.1.bias is only here): "),
        ([(MATRICES, {})], "has 2 parameter groups, the optimizer 1 (embed is only saved): "),
    ):
        words = words if is_named else re.sub(r" \(.*\)", "", words)
        with pytest.raises(ValueError, match=re.escape(words) + "use the same model"):
            optimizer_of(*here, is_named=is_named).load_state_dict(saved)


# --- convert_state_dict(saved, like=optimizer) ----------------------------------------------------------------------

TWO_RATES = [(MATRICES, {}), ("embed", {**HIGH, "betas": (0.5, 0.75)}), ("l.0.bias l.1.bias", LOW)]


@pytest.mark.parametrize("is_scheduled", [False, True])
def test_a_group_of_several_saved_rates_has_the_one_of_like_and_names_it(is_scheduled):
    saved, running = optimizer_of(*TWO_RATES), optimizer_of((MATRICES, {}), ("embed l.0.bias l.1.bias", LOW), steps=0)
    if is_scheduled:
        scheduled(saved)
    converted, words = told(lambda: convert_state_dict(saved.state_dict(), like=running))
    lrs = ("initial_lr=0.5, lr=0.25", "initial_lr=0.25, lr=0.125") if is_scheduled else ("lr=0.5", "lr=0.25")
    assert words == [
        "group 1 has betas=(0.9, 0.95), lr=0.25 of `like`, as its parameters were saved with several: "
        f"embed betas=(0.5, 0.75), {lrs[0]}, l.0.bias betas=(0.9, 0.95), {lrs[1]}"
    ]
    running.load_state_dict(converted)
    muon, adamw = running.param_groups
    assert (muon["lr"], muon.get("initial_lr")) == ((0.0625, 0.125) if is_scheduled else (0.125, None))
    assert (adamw["lr"], adamw.get("initial_lr"), adamw["betas"]) == (0.25, None, (0.9, 0.95))
    for name, state in states_of(saved).items():
        for key, value in state.items():
            assert_bitwise(states_of(running)[name][key], value)


def test_a_saved_lr_that_is_not_the_one_of_like_is_told():
    saved = optimizer_of((MATRICES, {}), ("embed", HIGH), ("l.0.bias l.1.bias", LOW))
    scheduled(saved)
    running = optimizer_of((MATRICES, {"lr": 0.375}), ("embed", HIGH), ("l.0.bias", HIGH), ("l.1.bias", LOW), steps=0)
    _, words = told(lambda: convert_state_dict(saved.state_dict(), like=running))
    assert words == [
        "lr is the saved one: group 0 (l.0.w, ...) has 0.125, in `like` 0.375, group 2 (l.0.bias) has 0.25, "
        "in `like` 0.5; set another after loading"
    ]


def test_state_of_the_other_algorithm_is_left_out_if_asked_and_by_name():
    saved = optimizer_of((MATRICES, {}), ("embed l.0.bias l.1.bias", LOW), param_rounding="stochastic")
    here = [("l.0.w", {}), ("l.1.w", HIGH), ("embed", {}), ("l.0.bias l.1.bias", LOW)]
    running = optimizer_of(*here, steps=0, param_rounding="stochastic")
    message = r"l\.1\.w was stepped by muon, `like` has it in a group of adamw: .*drop_moved=True .--drop-moved"
    with pytest.raises(ValueError, match=message):
        convert_state_dict(saved.state_dict(), like=running)
    converted, words = told(lambda: convert_state_dict(saved.state_dict(), like=running, drop_moved=True))
    assert words == [
        "without their state, as it is another algorithm's: l.1.w (from muon to adamw), embed (from adamw to muon)"
    ]
    with pytest.warns(UserWarning, match=r"no saved state for l\.1\.w, embed"):
        running.load_state_dict(converted)
    assert [group["lr"] for group in running.param_groups] == [0.125, 0.5, 0.125, 0.25]
    assert [group["rounding_step"] for group in running.param_groups] == [1] * 4
    found, expected = states_of(running), states_of(saved)
    assert not found["l.1.w"]
    assert not found["embed"]
    for name in ("l.0.w", "l.0.bias", "l.1.bias"):
        for key, value in expected[name].items():
            assert_bitwise(found[name][key], value)
    for param in (param for group in running.param_groups for param in group["params"]):
        param.grad = torch.ones_like(param)
    running.step()
    assert states_of(running)["l.1.w"]["step"] == 1


def test_drop_moved_without_moved_parameters_changes_nothing():
    saved = optimizer_of(*TWO_RATES)
    converted, words = told(lambda: convert_state_dict(saved.state_dict(), like=saved, drop_moved=True))
    assert words == []
    assert converted["param_groups"] == saved.state_dict()["param_groups"]


# --- names of an AdamW's parameters ---------------------------------------------------------------------------------


def two_groups():
    """An AdamW with decay for matrices alone, without names, and the names in the order of its groups."""
    params = {name: torch.nn.Parameter(torch.ones(shape)) for name, shape in SHAPES.items()}
    order = sorted(params, key=lambda name: params[name].ndim)
    groups = [[params[name] for name in order if params[name].ndim == ndim] for ndim in (1, 2)]
    adamw = torch.optim.AdamW([{"params": group} for group in groups], weight_decay=0.0)
    for param in params.values():
        param.grad = torch.ones_like(param)
    adamw.step()
    return adamw.state_dict(), order


@pytest.mark.parametrize("is_optimizer", [True, False])
def test_names_in_another_order_than_adamws_groups_are_refused_by_the_shapes(is_optimizer):
    saved, order = two_groups()
    running = optimizer_of((MATRICES, {}), ("embed l.0.bias l.1.bias", LOW), steps=0)
    like = running if is_optimizer else running.state_dict()
    with pytest.raises(ValueError, match=r"give names .*in the order of AdamW's groups; only of a single group"):
        convert_state_dict(saved, source="adamw", like=like)
    words = (
        r"l\.0\.w is \(16, 40\) in `like`, its saved state \(6,\)"
        if is_optimizer
        else r".*l\.0\.w is \(6,\), .*matrices"
    )
    with pytest.raises(ValueError, match=rf"^names do not fit the saved shapes: {words}.*order of the saved groups"):
        convert_state_dict(saved, source="adamw", like=like, names=list(SHAPES))
    running.load_state_dict(told(lambda: convert_state_dict(saved, source="adamw", like=like, names=order))[0])


def test_a_state_of_another_shape_is_told_where_the_names_are_the_saved_ones():
    optimizer = optimizer_of((MATRICES, {}), ("embed l.0.bias l.1.bias", LOW))
    saved = optimizer.state_dict()
    saved["state"][2] = {**saved["state"][2], "exp_avg": torch.ones(11, 8), "exp_avg_sq": torch.ones(11, 8)}
    with pytest.raises(ValueError, match=r"^embed is \(10, 8\) in `like`, its saved state \(11, 8\): build both from"):
        convert_state_dict(saved, like=optimizer)
