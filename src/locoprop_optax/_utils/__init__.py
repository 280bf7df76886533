"""Numbers, their precision, and where they are."""
