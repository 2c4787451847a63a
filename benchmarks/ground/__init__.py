"""Small worlds with exact targets, and many runs of a method on them at once; see ``benchmarks/estimators.py``."""
