"""``python -m tiltlm`` is the command line."""

from tiltlm.cli.main import main

main()
