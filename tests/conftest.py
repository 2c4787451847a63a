"""What holds for all tests: nothing is downloaded."""

import os

# Read when huggingface_hub is first imported, so it comes before any test module.
os.environ["HF_HUB_OFFLINE"] = "1"
