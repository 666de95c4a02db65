"""Every shipped recipe is valid, and builds a model as large as its name says."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from finetune.config.reading import RECIPES
from finetune.config.recipe import DEFAULT_RECIPE, read_recipe
from finetune.models.build import model_config

NAMES = sorted(path.stem for path in RECIPES.glob("*.yaml"))


@pytest.mark.parametrize("name", NAMES)
def test_recipe_is_valid_and_builds_a_model_of_its_size(name):
    recipe = read_recipe(name)
    assert recipe.name == name
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(model_config(recipe))
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    size = name.split("_")[1]
    named = float(size[:-1]) * (1000 if size.endswith("b") else 1)
    assert millions == pytest.approx(named, rel=0.16)


def test_sizes_reach_from_the_default_to_over_a_billion():
    assert DEFAULT_RECIPE in NAMES
    assert any(name.endswith("b") for name in NAMES)
    assert read_recipe(DEFAULT_RECIPE).dataset == "stdlib"  # no download
