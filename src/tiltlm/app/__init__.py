"""Config to objects and back: fit a target, tune a model, sample a target, finish a run."""
