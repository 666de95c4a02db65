"""Step times, kernels and memory, on a GPU and on a CPU."""
