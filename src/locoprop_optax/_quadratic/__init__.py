"""The Gauss-Newton model of a loss, and the step that can be trusted with it."""
