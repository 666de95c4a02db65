"""The two ends of a model: embeddings, output heads, and Linears that may be heads."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import Tensor, nn

from ..config import Routing
from .lora import is_adapter

# Heads by name whatever their size, and names that mean a head only where the rows equal the vocabulary; both
# only outside numbered layers, where `output` and `decoder` are everyday names of hidden matrices.
_HEAD = re.compile(
    r"(^|\.)(lm_head|score|classifier|qa_outputs|embed_out|v_head|(classifier|classification_head)\.out_proj)$"
)
_VOCABULARY_HEAD = re.compile(r"(^|\.)(head|output|outputs|out|logits|to_logits|unembed|decoder|generator)$")
# Names that PEFT's and the parallel wrappers put between a module and its parameters.
WRAPPERS = re.compile(
    r"\.(modules_to_save\.\w+|original_module|base_layer)\b|\b(_orig_mod|_checkpoint_wrapped_module)\."
)


@dataclass
class Ends:
    """Parameters at the two ends of a model with the reason for each; `doubtful` may be a head.

    `routing` is the release whose rules hold. `sinks` are Linears outside numbered layers that give vectors of a size
    that nothing in the model takes.
    """

    routing: Routing
    embeddings: dict[Tensor, str] = field(default_factory=dict)
    heads: dict[Tensor, str] = field(default_factory=dict)
    doubtful: Tensor | None = None
    sinks: set[Tensor] = field(default_factory=set)


def find_ends(model: nn.Module, routing: Routing) -> Ends:
    """Return the embeddings and the heads of a model.

    Embeddings are found by module type and `get_input_embeddings`; heads by `get_output_embeddings` of any submodule
    and by name, or, without these methods, the last Linear if it has the first embedding's rows.
    """
    ends, tables, linears, is_hugging_face = Ends(routing), [], [], False
    for path, module in model.named_modules():
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
            ends.embeddings[module.weight] = "embedding"
            tables.append(module.weight)
        elif isinstance(module, nn.Linear) and not is_adapter(f"{path}.weight"):
            linears.append((WRAPPERS.sub("", path), module))
        is_hugging_face |= hasattr(module, "get_output_embeddings")
        for param in _part(module, "get_input_embeddings"):
            ends.embeddings.setdefault(param, "input embedding")
        for param in _part(module, "get_output_embeddings"):
            ends.heads.setdefault(param, "output head")
    rows = {table.shape[0] for table in tables}
    for path, module in linears:
        of_vocabulary = module.out_features in rows and _VOCABULARY_HEAD.search(path)
        if (_HEAD.search(path) or of_vocabulary) and not re.search(r"(^|\.)\d+\.", path):
            ends.heads.setdefault(module.weight, "output head, by its name")
    known = ends.heads.keys() | ends.embeddings.keys()
    if linears and not is_hugging_face and not any(module.weight in known for _, module in linears):
        last = linears[-1][1]
        if tables and last.out_features == tables[0].shape[0]:
            ends.heads[last.weight] = "output head: last Linear, rows of the first embedding"
        elif not tables:
            ends.doubtful = last.weight
    return ends


def _part(module: nn.Module, getter: str) -> Iterator[nn.Parameter]:
    """Yield the parameters of the module that a Hugging Face getter returns; none where it is missing or raises."""
    try:
        part = getattr(module, getter)()
    except (AttributeError, NotImplementedError):
        return
    if isinstance(part, nn.Module):
        yield from part.parameters()
