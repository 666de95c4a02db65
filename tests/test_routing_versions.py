"""`routing="0.1"` gives the groups that release 0.1 gave, and the scripts keep it for its runs."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import routing_models
import torch
import yaml

from finetune import pretrain, sft
from finetune.optimizers import build_optimizers
from finetune.options import ROUTINGS as OPTION
from muon8bit import param_groups
from muon8bit.config import ROUTINGS

SAVED = json.loads((Path(__file__).parent / "data" / "routing_0_1.json").read_text())
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
    assert OPTION == ROUTINGS


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
