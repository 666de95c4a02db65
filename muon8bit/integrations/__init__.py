"""Adapters to other libraries, one module each; importing muon8bit imports none of them."""
