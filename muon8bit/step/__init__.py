"""One optimizer step, in the order in which things happen."""
