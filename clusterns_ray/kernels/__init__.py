"""Dropout and attention over packed tokens: tensors in, tensors out."""
