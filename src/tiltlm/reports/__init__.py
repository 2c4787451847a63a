"""Reports of a run: HTML, charts, tables and model card, made from a run directory alone."""
