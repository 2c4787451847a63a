"""What holds for the tests of samplers."""

import torch

# Tiny tensors gain nothing from threads, and lose much where other processes want the cores too.
torch.set_num_threads(1)
