"""Several ranks: simulated, counted, run."""
