"""Worlds that are known in full, and many runs of a method on them at once; see ``benchmarks/estimators.py``."""
