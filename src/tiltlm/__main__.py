"""``python -m tiltlm`` is the command line."""

from tiltlm.cli import main

main()
