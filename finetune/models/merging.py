"""Adapters on the base that they were trained on, and folded into it."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from peft.tuners.tuners_utils import BaseTunerLayer

from finetune.config.errors import InputError
from finetune.config.sft_recipe import SftRecipe
from finetune.data.texts import ENCODING
from finetune.models.adapters import BASE_FILE, base_fingerprint, base_of_adapter, load_adapter, same_base
from finetune.models.build import logits_of
from finetune.models.pretrained import base_config, buffer_fingerprint, load_base
from finetune.models.routers import BIAS
from finetune.models.tokens import load_tokenizer
from finetune.models.weights import first_line
from finetune.storage.outputs import save_model
from finetune.storage.run_dir import RunFolder, holds_nothing, newest_complete

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# How much a merge may change the logits of TEXT: the 2-norm of the change over that of the logits, by the dtype of the
# base. fp32 sums in another order; bf16 rounds activations and each folded weight to 2^-9 of it. Measured on
# SmolLM2-135M with an adapter of rank 16: 1e-6 and 2e-2.
LARGEST_CHANGE = {"fp32": 1e-4, "bf16": 5e-2}
TEXT = "def area(width, height):\n    return width * height  # The area of a rectangle is its width times its height."


@dataclass(frozen=True)
class AdapterSource:
    """A saved adapter, and what is known of its base.

    Args:
        folder: that holds adapter_config.json.
        base: folder or hub name that the base is loaded from.
        mode: `lora`, or `qlora` for an adapter that was trained on an NF4 base.
        dtype: `fp32` or `bf16`, of the base's weights that are not NF4.
        weights: `base_fingerprint` of these weights; None where it was not recorded, as by release 0.1.
        buffers: `buffer_fingerprint` of the base; None where it has no buffers, or they were not recorded.
    """

    folder: Path
    base: str
    mode: str
    dtype: str
    weights: str | None
    buffers: str | None = None


def find_adapter(path: Path, base: str | None = None) -> AdapterSource:
    """Find the adapter of a run, or in a folder.

    Args:
        path: folder of a run, or of an adapter.
        base: where its base lies now; None for where it was when the adapter was trained.

    Raises:
        InputError: there is none, it is not LoRA or DoRA, or its base is known by its name alone and is another one.
    """
    folder = path if (path / "adapter_config.json").is_file() else path / "adapter"
    if not (folder / "adapter_config.json").is_file():
        if (path / "model").is_dir():
            raise InputError("RUN", f"{path} trained all weights: its model/ is whole, and there is nothing to merge")
        if (path / "recipe.yaml").is_file():
            raise InputError("RUN", _incomplete(path))
        if not path.exists():
            raise InputError("RUN", f"there is no {path}; give the folder of a run or of an adapter")
        raise InputError("RUN", f"{path} holds no adapter_config.json; give the folder of a run or of an adapter")
    named = base_of_adapter(folder, "RUN")
    record = _recorded(folder)
    source = AdapterSource(
        folder,
        base or named,
        record.get("mode", "lora"),
        record.get("dtype") or ("bf16" if base_config(base or named).dtype == torch.bfloat16 else "fp32"),
        record.get("weights"),
        record.get("buffers"),
    )
    if source.weights is None and not same_base(named, source.base):
        raise InputError(
            "--base",
            f"{folder} was trained on {named}, and does not tell of that base's weights; give that one, or, if it has "
            "only moved, correct base_model_name_or_path in its adapter_config.json",
        )
    return source


def _incomplete(path: Path) -> str:
    """Return what is to be done with a run that has left no model, and which run beside it is complete."""
    way_out = "is not complete: it has no model/ or adapter/ yet; finish it by --resume"
    if holds_nothing(path):
        way_out = "has no model and no checkpoint; start it anew, and delete this folder if no process works in it"
    complete = newest_complete(path.parent)
    return f"{path} {way_out}" + (f"; {complete} is complete" if complete else "")


def _recorded(folder: Path) -> dict[str, Any]:
    """Return what the adapter tells of its base; of a run of release 0.1 what its recipe tells."""
    file = folder / BASE_FILE
    try:
        if file.is_file():
            record: dict[str, Any] = json.loads(file.read_text(encoding=ENCODING))
            return record
        recipe = RunFolder(folder.parent).recipe_file
        values = yaml.safe_load(recipe.read_text(encoding=ENCODING)) if recipe.is_file() else {}
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise InputError("RUN", f"cannot read what {folder} tells of its base: {error}") from None
    mode = values.get("mode", "lora")
    dtype = {"auto": "bf16" if mode == "qlora" else "fp32"}.get(values.get("dtype", "auto"), values.get("dtype"))
    return {"mode": mode, "dtype": dtype} if values else {}


def load_adapted(source: AdapterSource, device: torch.device) -> Any:
    """Load a base as it was when the adapter was trained, and the adapter on it, in evaluation mode.

    Raises:
        InputError: the base cannot be loaded, or is another one than the adapter was trained on.
    """
    recipe = SftRecipe(name="merge", model=source.base, mode=source.mode, dtype=source.dtype)
    model = load_base(source.base, recipe, device)
    has_other_buffers = source.buffers is not None and buffer_fingerprint(model) != source.buffers
    if has_other_buffers or (source.weights is not None and base_fingerprint(model) != source.weights):
        raise InputError(
            "--base",
            f"{source.base} has other weights than the base that {source.folder} was trained on; give that base",
        )
    return load_adapter(model, source.folder, source.base, "RUN").eval()


@torch.no_grad()
def merge_adapter(source: AdapterSource, output: Path, dtype: str | None, say: Callable[[str], None]) -> None:
    """Merge an adapter into its base, and save the result as an ordinary model with the tokenizer of the adapter.

    The merge is done on the CPU, in fp32 one matrix at a time, so that beside the model one matrix is held twice. An
    NF4 base is dequantized: the adapter was trained on these weights, not on those that were rounded to them.

    Args:
        source: of `find_adapter`.
        output: the folder to write.
        dtype: `fp32` or `bf16`, of what is saved; None for that of the base.
        say: takes a line of what was done.

    Raises:
        InputError: as `load_adapted`; the result is not finite, or its logits differ from those of the adapter on its
            base by more than `LARGEST_CHANGE`. Nothing is written then.
    """
    dtype = dtype or source.dtype
    has_tokenizer = (source.folder / "tokenizer_config.json").is_file()
    tokenizer = load_tokenizer(str(source.folder) if has_tokenizer else source.base, "RUN")
    adapted = load_adapted(source, torch.device("cpu"))
    ids = torch.tensor([tokenizer(TEXT)["input_ids"]])
    expected = logits_of(adapted, input_ids=ids)
    if source.mode == "qlora":
        say(f"the base is dequantized from NF4 to {source.dtype}: the adapter was trained on these weights")
        base = adapted.unload().dequantize()
        adapted = load_adapter(base, source.folder, source.base, "RUN").eval()
    merged = _fold(adapted, DTYPES["fp32" if dtype == "fp32" else source.dtype], source)
    change = float((logits_of(merged, input_ids=ids) - expected).norm() / expected.norm())
    if not change <= LARGEST_CHANGE[source.dtype]:
        raise InputError(
            "RUN",
            f"merging {source.folder} changes logits by {change:.1e} of their norm, and on a base in {source.dtype} "
            f"{LARGEST_CHANGE[source.dtype]:.0e} may be; use the adapter as it is",
        )
    save_model(output, _cast(merged, DTYPES[dtype]), None, tokenizer)
    rounded = f", then rounded to {dtype}" if (source.dtype, dtype) == ("fp32", "bf16") else ""
    say(f"merged in fp32, logits are within {change:.1e} of their norm{rounded}; saved in {dtype}: {output}")


def _fold(adapted: Any, dtype: torch.dtype, source: AdapterSource) -> Any:
    def change(param: Any, to: torch.dtype) -> None:
        param.data = param.data.to(to)

    try:
        for module in adapted.modules():
            if isinstance(module, BaseTunerLayer):
                layer: Any = module.get_base_layer()
                name = getattr(module, "parameter_name", "weight")  # peft's ParamWrapper: of stacked experts
                change(getattr(layer, name), torch.float32)
                module.merge(safe_merge=True)
                change(getattr(layer, name), dtype)
    except ValueError as error:  # NaN or Inf
        raise InputError("RUN", f"cannot merge {source.folder}: {first_line(error)}") from None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that the layers are merged already
        return _cast(adapted.merge_and_unload(), dtype)


def _cast(model: Any, dtype: torch.dtype) -> Any:
    """Convert a model to a dtype, but for the biases of the choice of experts, which stay in fp32."""
    kept = [(module, module._buffers[BIAS]) for module in model.modules() if BIAS in module._buffers]
    model.to(dtype)
    for module, bias in kept:
        setattr(module, BIAS, bias)
    return model
