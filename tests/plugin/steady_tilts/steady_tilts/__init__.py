"""What somebody may add to tiltlm from outside: an objective, a target and a callback."""
