"""`routing="0.1"` gives the groups that release 0.1 gave, and the scripts keep it for its runs."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
import yaml
from helpers import routing_models
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict

from finetune import pretrain, sft
from finetune.config import options as script_options
from finetune.models.optimizers import build_optimizers
from muon8bit import Muon8bit, convert_state_dict, param_groups
from muon8bit.config import ROUTERS, ROUTINGS, SPLIT_HEADS
from muon8bit.integrations.distributed_checkpoint import load_checkpoint

SAVED = json.loads((Path(__file__).parents[1] / "data" / "routing_0_1.json").read_text())
UNCHANGED = {"llama", "mixtral", "lora", "loha"}


@pytest.mark.parametrize("case", routing_models.MODELS)
def test_groups_of_the_first_release_are_reproduced(case: str) -> None:
    with torch.device("meta"):
        model = routing_models.MODELS[case]()
    old = json.loads(json.dumps(routing_models.in_words(param_groups(model, lr=1e-3, routing="0.1"))))
    assert old == SAVED[case]
    new = json.loads(json.dumps(routing_models.in_words(param_groups(model, lr=1e-3))))
    assert (new == SAVED[case]) == (case in UNCHANGED)


def test_unknown_routing_is_refused() -> None:
    with pytest.raises(ValueError, match=r"routing is '0\.3'.*'0\.1', '0\.2'"):
        param_groups(routing_models.llama(), lr=1e-3, routing="0.3")  # type: ignore[arg-type]
    assert script_options.ROUTINGS == ROUTINGS
    assert ("none", *SPLIT_HEADS) == script_options.SPLIT_HEADS
    assert script_options.ROUTERS == ROUTERS


RECORDS = {
    pretrain: {"name": "x", "model": {"model_type": "gpt2"}, "max_steps": 4},
    sft: {"name": "x", "model": "somewhere/gpt2", "max_steps": 4, "date": "2026-01-01"},
}


@pytest.mark.parametrize("script", RECORDS, ids=["pretrain", "sft"])
def test_a_run_without_a_recorded_routing_is_resumed_by_the_first_rules(script: Any, tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / "step-0000002").mkdir(parents=True)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(RECORDS[script]))
    recipe, folder = script.parse(["--resume", str(tmp_path)])
    assert recipe.routing == "0.1"
    model = routing_models.MODELS["gpt2"]()
    (optimizer,) = build_optimizers(model, dataclasses.replace(recipe, lr=1e-3))
    names = [" ".join(group["param_names"]) for group in optimizer.param_groups]
    assert names == [names for *_, names in SAVED["gpt2"]]
    folder.recipe_file.write_text(yaml.safe_dump(dataclasses.asdict(dataclasses.replace(recipe, routing="0.2"))))
    assert script.parse(["--resume", str(tmp_path)])[0].routing == "0.2"


def stepped(model: nn.Module, **options: Any) -> Muon8bit:
    """An optimizer after one step with gradients of ones."""
    optimizer = Muon8bit(param_groups(model, lr=1e-3, **options), lr=1e-3)
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    optimizer.step()
    return optimizer


@pytest.mark.parametrize("wrapper", ["", "_orig_mod."])
def test_moved_parameters_of_a_checkpoint_are_named_with_the_way_out(wrapper: str) -> None:
    saved = stepped(routing_models.MODELS["gpt2"](), routing="0.1").state_dict()
    for group in saved["param_groups"]:
        group["param_names"] = [wrapper + name for name in group["param_names"]]
    running = stepped(routing_models.MODELS["gpt2"]())
    before = copy.deepcopy(running.state_dict())
    message = (
        r"1 parameter in another group .*transformer\.wpe\.weight \(saved: adamw, weight_decay=0\.1; here: adamw, "
    )
    with pytest.raises(
        ValueError,
        match=message + r"weight_decay=0\.0\).*convert_state_dict\(saved, like=optimizer\).*patterns.*routing='0\.1'",
    ):
        running.load_state_dict(saved)
    assert running.state_dict()["param_groups"] == before["param_groups"]
    assert_equal(running.state_dict()["state"], before["state"])
    again = Muon8bit(param_groups(routing_models.MODELS["gpt2"](), lr=1e-3, routing="0.1"), lr=1e-3)
    again.load_state_dict(saved)
    assert_equal(again.state_dict()["state"], saved["state"])


def test_a_checkpoint_whose_split_differs_names_the_parameters() -> None:
    """The other algorithm and other pieces of the same matrix are seen too, also where no weight decays."""
    model = routing_models.MODELS["jetmoe"]()
    saved = stepped(model, routing="0.1", weight_decay=0.0).state_dict()
    with pytest.raises(ValueError, match=r"input_linear\.weight \(saved: adamw.*here: muon.*split_sizes=\(48, 48\)"):
        stepped(model, weight_decay=0.0).load_state_dict(saved)


@pytest.mark.parametrize(
    ("saved_with", "here", "message"),
    [
        (
            None,
            "head",
            r"q_b_proj\.weight x2 \(.*=None; .*=6 x 8\), .*kv_b_proj\.weight x2 \(.*=6 x 12\): .*`split_heads`",
        ),
        ("head_kv", None, r"kv_b_proj\.weight x2 \(saved: muon, split_sizes=6 x \(4 \+ 8\); here: muon, split_sizes=N"),
        (
            "head",
            "head_kv",
            r"saved with split_sizes=6 x 12, the optimizer has 6 x \(4 \+ 8\): .*`split_heads` of para",
        ),
    ],
)
def test_a_checkpoint_of_other_heads_is_refused_and_goes_on_by_name(saved_with: Any, here: Any, message: str) -> None:
    """Momenta do not depend on the pieces: what is taken over by name is the saved state, bitwise."""
    model = routing_models.latent(num_attention_heads=6, num_key_value_heads=6)
    saved = stepped(model, split_heads=saved_with).state_dict()
    running = stepped(model, split_heads=here)
    before = copy.deepcopy(running.state_dict())
    with pytest.raises(ValueError, match=message) as error:
        running.load_state_dict(saved)
    assert "convert_state_dict(" in str(error.value)
    assert running.state_dict()["param_groups"] == before["param_groups"]
    running.load_state_dict(convert_state_dict(saved, like=running))
    state, names = running.state_dict(), [n for g in running.param_groups for n in g["param_names"]]
    old = dict(zip((n for g in saved["param_groups"] for n in g["param_names"]), saved["state"].values(), strict=True))
    assert_equal(dict(zip(names, state["state"].values(), strict=True)), old)
    sizes, wanted = ([g.get("split_sizes") for g in one["param_groups"]] for one in (state, before))
    assert sizes == wanted


def test_a_checkpoint_of_other_routers_starts_theirs_anew_where_asked() -> None:
    model = routing_models.latent()
    saved, running = stepped(model).state_dict(), stepped(model, routers="muon")
    with pytest.raises(ValueError, match=r"1 parameter .*mlp\.gate\.weight \(saved: adamw; here: muon\).*`routers`"):
        running.load_state_dict(saved)
    with pytest.warns(UserWarning, match=r"mlp\.gate\.weight"):
        running.load_state_dict(convert_state_dict(saved, like=running, drop_moved=True))
    (gate,) = (p for n, p in model.named_parameters() if n.endswith("mlp.gate.weight"))
    assert not running.state.get(gate)
    assert len(running.state) == len(list(model.parameters())) - 1


@pytest.mark.parametrize(("name", "moved"), [("gpt2", r"transformer\.wpe"), ("jetmoe", "input_linear")])
def test_a_distributed_checkpoint_names_them_too(name: str, moved: str, tmp_path: Path) -> None:
    model = routing_models.MODELS[name]()
    state = get_optimizer_state_dict(model, stepped(model, routing="0.1"))
    dcp.save({"model": get_model_state_dict(model), "optimizer": state}, checkpoint_id=tmp_path)
    with pytest.raises(ValueError, match=rf"(?s){moved}.*routing='0\.1'"):
        load_checkpoint(model, stepped(model), tmp_path)


def test_a_checkpoint_of_another_model_keeps_its_own_error() -> None:
    saved = stepped(routing_models.llama()).state_dict()
    with pytest.raises(ValueError, match=r"the same model|would go to"):
        stepped(routing_models.Own()).load_state_dict(saved)


def assert_equal(found: Any, wanted: Any) -> None:
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)
