"""Short training scripts, one for each kind of model."""
