"""Permutation symmetry of networks: its specification, its derivation from layers, and matching under it."""
