"""Benchmarks of locoprop_optax: run each as `python -m benchmarks.<name>`."""
