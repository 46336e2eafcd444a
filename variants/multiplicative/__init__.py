"""Variants that multiply the frozen weight, or the layer's input or output, by a learned map."""
