"""Training scripts around `muon8bit`: pretraining on text, and what those scripts share."""
