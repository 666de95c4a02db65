"""One thread: the suite's matrices are small, and two test processes share the cores."""

import torch

torch.set_num_threads(1)
