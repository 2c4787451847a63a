"""Training: the loop and what keeps it alive. Import from the modules; the settings alone need no torch."""
