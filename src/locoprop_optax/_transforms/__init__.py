"""What users call: Optax transformations."""
