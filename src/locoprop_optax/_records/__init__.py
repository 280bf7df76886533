"""What a captured pass leaves behind for an optimizer, layer by layer."""
