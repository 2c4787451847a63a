"""What holds for all tests: nothing is downloaded, and Ctrl-C is heard."""

import os
import signal

# Read when huggingface_hub is first imported, so it comes before any test module.
os.environ["HF_HUB_OFFLINE"] = "1"

# A shell starts a job in the background, as with `make test &`, with SIGINT ignored, and Python leaves that as it is.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
