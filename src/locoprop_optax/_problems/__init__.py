"""One layer's local problem, and which problems are solved together."""
