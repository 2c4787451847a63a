"""Settings for the tests of guides."""

import torch

# Tiny tensors gain nothing from threads, and other processes want the cores.
torch.set_num_threads(1)
