"""Replay: past samples that later updates train on again."""
