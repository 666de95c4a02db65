"""The coordinate check: how much activations change in a few steps, by width."""
