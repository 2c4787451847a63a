"""A run directory: its one writer and reader, and resuming."""
