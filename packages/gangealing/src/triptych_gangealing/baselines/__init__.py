"""Alignment without a generator: what a learned alignment must beat."""
