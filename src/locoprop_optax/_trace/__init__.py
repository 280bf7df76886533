"""The traced loss: its layers, their records, and where the rest of it is convex."""
