"""Training scripts around `muon8bit`: pretraining and fine-tuning, and what comes after a run."""

from __future__ import annotations

import logging
from importlib.util import find_spec

_NEEDED = ("accelerate", "numpy", "peft", "safetensors", "tokenizers", "tqdm", "transformers", "yaml")

if _missing := [name for name in _NEEDED if find_spec(name) is None]:
    raise ModuleNotFoundError(f"the scripts need {', '.join(_missing)}: pip install '.[train]' in the checkout")

# On a CPU with AVX512_BF16 bitsandbytes says at its import that it failed to load `kernels`, a package of Hugging Face
# that would fetch a faster 4-bit product from the hub. The scripts do not use that product, which has no gradient; see
# finetune.models.pretrained. Whether our folder of that name is on the path changes the wording alone.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
