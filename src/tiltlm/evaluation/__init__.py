"""Fresh samples of a model, measured. Import from the modules."""
