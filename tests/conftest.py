"""What holds for all tests: nothing is downloaded, tensors use one thread, and Ctrl-C is heard."""

import os
import signal

# Read when huggingface_hub is first imported, so it comes before any test module.
os.environ["HF_HUB_OFFLINE"] = "1"

# Read when torch is first imported. Tiny tensors gain nothing from threads, and the other processes need the cores.
os.environ["OMP_NUM_THREADS"] = "1"

# A shell starts a job in the background, as with `make test &`, with SIGINT ignored, and Python leaves that as it is.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
