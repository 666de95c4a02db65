"""The pretrained model of a fine-tuning run: found, checked to be one that can be tuned, and loaded."""

from __future__ import annotations

import hashlib
import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils.logging import disable_progress_bar

from finetune.config.checks import check_model_folder, package_file
from finetune.config.errors import InputError
from finetune.config.sft_recipe import SftRecipe
from finetune.data.readers import reach_hub
from finetune.data.texts import ENCODING
from finetune.models.build import checkpoint_activations, config_hash, logits_of
from finetune.models.tokens import cache_root
from finetune.models.weights import (
    beside_text,
    first_line,
    freeze_beside_text,
    load_whole,
    model_class,
    refuse_part,
    text_config,
)
from finetune.parallel.launch import plain_buffers
from finetune.storage.run_dir import folder_beside

# Bump when a GGUF file would become another folder.
FORMAT = 1
# Bump when a resized base would become another folder.
RESIZED_FORMAT = 1
# Elements of each weight that a fingerprint looks at.
SAMPLED = 256
# How the names of architectures end that predict the next token, and of those whose configuration nests a text part.
CAUSAL = ("ForCausalLM", "LMHeadModel")
CAUSAL_WITH_IMAGES = ("ForConditionalGeneration",)
# Known to be pretrained with Adam (papers or reports of the families); a run of ours says it in its result.json.
ADAM_FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma", "phi", "smollm3", "olmo", "gpt2", "gpt_neox", "opt")


def find_base(model: str) -> str:
    """Return the folder or hub name for `from_pretrained`. A GGUF file becomes a folder in the cache, once.

    Args:
        model: a folder, a hub name, a GGUF file, or `package:NAME`, an installed package that brings one GGUF file.

    Raises:
        InputError: no such package, not one GGUF file in it, or a file that transformers cannot read or that lacks
            weights.
    """
    path = package_file(model) if model.startswith("package:") else Path(model)
    if path.suffix.lower() == ".gguf":
        refuse_part(path, "--model")
        return str(_gguf_folder(path))
    check_model_folder(path, "--model")
    return model


def _gguf_folder(file: Path) -> Path:
    """Make an ordinary folder of a GGUF file, named by its hash: weights dequantized to bf16, and the tokenizer.

    transformers takes a GGUF model for frozen and quantized: it would not save it, and NF4 on top fails.
    """
    digest = hashlib.sha256()
    try:
        with file.open("rb") as opened:
            while chunk := opened.read(2**22):
                digest.update(chunk)
    except OSError as error:
        raise InputError("--model", f"cannot read {file}: {error.strerror}") from None
    folder = cache_root() / "models" / f"gguf{FORMAT}-{file.stem}-{digest.hexdigest()[:24]}"
    if folder.is_dir():
        return folder
    print(f"{file.name}: dequantizing to bf16 into {folder}", flush=True)
    config: Any = getattr(transformers, "GgufConfig", None)  # before it came, transformers always dequantized
    more = {} if config is None else {"quantization_config": config(dequantize=True)}
    model = load_whole(AutoModelForCausalLM, file.parent, "--model", gguf_file=file.name, dtype=torch.bfloat16, **more)
    try:
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    except Exception as error:
        raise InputError("--model", f"transformers cannot read the tokenizer of {file}: {first_line(error)}") from None
    with folder_beside(folder) as beside:
        model.save_pretrained(beside)
        tokenizer.save_pretrained(beside)
    return folder


def base_config(base: str) -> Any:
    """Return the transformers configuration of a base.

    Args:
        base: of `find_base`.

    Raises:
        InputError: unreadable, no causal language model, or quantized already.
    """
    reach_hub(base, "--model", "config.json")
    try:
        config = AutoConfig.from_pretrained(base)
        kind = model_class(config)
    except Exception as error:
        raise InputError("--model", f"transformers cannot open {base!r}: {first_line(error)}") from None
    known = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)
    names = [known] if isinstance(known, str) else list(known or ())
    architectures = config.architectures or names
    endings = CAUSAL if text_config(config) is config else (*CAUSAL, *CAUSAL_WITH_IMAGES)
    if kind is None or not any(name in names or name.endswith(endings) for name in architectures):
        what = ", ".join(config.architectures or [config.model_type])
        raise InputError("--model", f"{base} is {what}, no causal language model; give one like LlamaForCausalLM")
    if getattr(config, "quantization_config", None) is not None:
        raise InputError("--model", f"{base} is quantized already; give the unquantized model (qlora makes it NF4)")
    return config


def weight_dtype(recipe: SftRecipe) -> torch.dtype:
    """Return the dtype of the base's weights that are not NF4."""
    if recipe.dtype != "auto":
        return torch.float32 if recipe.dtype == "fp32" else torch.bfloat16
    half = recipe.mode == "qlora" or (recipe.mode == "lora" and torch.cuda.is_available())
    return torch.bfloat16 if half else torch.float32


def compute_precision(recipe: SftRecipe) -> str:
    """Return the mixed precision to ask Accelerate for, `auto`, `no` or `bf16`.

    For an NF4 base with bf16 weights beside, `auto` becomes `bf16`, in which the base multiplies.
    """
    if recipe.mode == "qlora" and recipe.mixed_precision == "auto" and weight_dtype(recipe) == torch.bfloat16:
        return "bf16"
    return recipe.mixed_precision


def load_base(base: str, recipe: SftRecipe, device: torch.device) -> Any:
    """Load the pretrained model in training mode, on the device: frozen for an adapter, in NF4 for `qlora`.

    What a model has beside its language model, such as a vision tower, is frozen, and stays in what is saved.

    Of an NF4 base only the norms are cast to fp32: embeddings and head keep `weight_dtype`, on an 8B model 2 GB
    instead of the 4 GB that peft's prepare_model_for_kbit_training makes of them.

    Raises:
        InputError: weights are missing or cannot be loaded, or later tokens change earlier logits.
    """
    dtype = weight_dtype(recipe)
    more: dict[str, Any] = {}
    if recipe.mode == "qlora":
        more = {"quantization_config": nf4_config(dtype), "device_map": {"": device}}  # on a CPU too
    disable_progress_bar()  # type: ignore[no-untyped-call]
    model = load_base_weights(base, device, dtype=dtype, **more)
    freeze_beside_text(model)
    for module in model.modules() if recipe.mode == "qlora" else ():
        if "Norm" in type(module).__name__:
            module.float()
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # Else, at the first evaluation on a CPU with AVX512_BF16, bitsandbytes packs the weights for inference: it
            # rounds their scales to bf16, gives no gradient, and fails on shapes that are no multiples of 32 and 64.
            module.support_avx512bf16_for_cpu = False
    _check_causal(model, base)
    if recipe.has_adapter:
        model.requires_grad_(False)
    if recipe.activation_checkpointing:
        checkpoint_activations(model)
    model.train()
    return model


def load_base_weights(base: str, device: torch.device | None = None, **more: Any) -> Any:
    """Load the whole pretrained model of a base, by the class that fits its configuration; else as `load_whole`.

    Raises:
        InputError: as `finetune.models.weights.load_whole`.
    """
    return load_whole(model_class(base_config(base)), base, "--model", device, **more)


def lacks_embeddings(config: Any, tokenizer: Any) -> bool:
    """Check whether a tokenizer has more tokens than the model of this configuration has embeddings."""
    return len(tokenizer) > int(text_config(config).vocab_size)


def resized_base(base: str, tokenizer: Any) -> str:
    """Return the folder, in the cache, of a base with an embedding for every token, made only if there is none.

    The new rows of embeddings and head are the mean of the others, so that no token is likelier than it was on average,
    and the same base gives the same bits. Dtypes are those of the checkpoint.

    Args:
        base: of `find_base`; its vocabulary is smaller than the tokenizer's.
        tokenizer: of the base, saved with it.

    Raises:
        InputError: the weights cannot be loaded.
    """
    model = load_base_weights(base, dtype="auto")
    digest = hashlib.sha256(
        f"{config_hash(model.config)}{fingerprint(model)}{buffer_fingerprint(model) or ''}".encode()
    )
    digest.update(tokenizer.backend_tokenizer.to_str().encode())
    folder: Path = cache_root() / "models" / f"resized{RESIZED_FORMAT}-{digest.hexdigest()[:24]}"
    if folder.is_dir():
        return str(folder)
    num_before, num_tokens = int(text_config(model.config).vocab_size), len(tokenizer)
    print(f"{base}: {num_tokens - num_before} embeddings are added to {num_before}, into {folder}", flush=True)
    model.resize_token_embeddings(num_tokens, mean_resizing=False)
    with torch.no_grad():
        for end in filter(None, (model.get_input_embeddings(), model.get_output_embeddings())):
            for tensor in end.parameters(recurse=False):  # weight and bias; tied weights get the same mean twice
                tensor[num_before:] = tensor[:num_before].double().mean(0).to(tensor.dtype)
    with folder_beside(folder) as beside:
        model.save_pretrained(beside)
        tokenizer.save_pretrained(beside)
    return str(folder)


def nf4_config(dtype: torch.dtype) -> Any:
    """Return the options of NF4 with twice quantized scales (QLoRA, arXiv 2305.14314), computing in `dtype`.

    Raises:
        InputError: bitsandbytes is not installed.
    """
    if find_spec("bitsandbytes") is None:
        raise InputError("--mode", "qlora needs bitsandbytes: pip install bitsandbytes, or give --mode lora")
    config: Any = transformers.BitsAndBytesConfig
    return config(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


@torch.no_grad()
def _check_causal(model: Any, base: str) -> None:
    """Check that two inputs that differ in their last token have equal logits before that token."""
    ids = torch.tensor([[1, 2, 3, 4], [1, 2, 3, 5]], device=model.device)
    try:
        if beside_text(model):  # some want to be told in training which tokens are images
            logits_of(model.train(), input_ids=ids)
        logits = logits_of(model.eval(), input_ids=ids)
    except Exception as error:
        raise InputError("--model", f"{base} does not take text alone: {first_line(error)}") from None
    gap = (logits[0, :-1] - logits[1, :-1]).abs().max()
    if not bool(gap <= 1e-3 * logits.abs().max()):
        raise InputError("--model", f"{base} is not causal: a later token changes its earlier logits")


def fingerprint(model: nn.Module) -> str:
    """Return the hex SHA-256 of some elements of every weight, as bytes; it tells bases of the same shapes apart."""
    digest = hashlib.sha256()
    for name, param in model.named_parameters():
        flat = param.detach().flatten()
        some = flat[:: max(1, flat.numel() // SAMPLED)][:SAMPLED].contiguous().cpu()
        digest.update(name.encode())
        digest.update(some.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def buffer_fingerprint(model: nn.Module) -> str | None:
    """Return the hex SHA-256 of the buffers that are saved with a model, as `e_score_correction_bias`; None without.

    An adapter on the model changes nothing of it. The values are rounded to bf16, as a base may be loaded.
    """
    digest, is_empty = hashlib.sha256(), True
    for name, buffer in sorted(plain_buffers(model), key=lambda entry: base_name(entry[0])):
        value = buffer.to(torch.bfloat16) if buffer.is_floating_point() else buffer
        digest.update(base_name(name).encode() + b"\0" + value.contiguous().view(torch.uint8).cpu().numpy().tobytes())
        is_empty = False
    return None if is_empty else digest.hexdigest()


def base_name(name: str) -> str:
    """Return the name that a tensor of a base has without an adapter on it."""
    name = name.removeprefix("base_model.model.")
    while ".base_layer." in name:  # one for each adapted parameter of stacked experts
        name = name.replace(".base_layer.", ".")
    return name


def pretrained_with(base: str, config: Any) -> str | None:
    """Return the optimizer that pretrained a base, as far as is known: our own run's, `adam`, or None."""
    record = Path(base).parent / "result.json"
    if record.is_file():
        try:
            return str(json.loads(record.read_text(encoding=ENCODING))["optimizer"])
        except (OSError, ValueError, TypeError, KeyError, RecursionError):  # another program's result.json
            return None
    return "adam" if str(config.model_type).startswith(ADAM_FAMILIES) else None
