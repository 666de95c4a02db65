"""Models, adapters, tokenizers, optimizers."""
