"""Pairs of images whose corresponding points are known, and PCK."""
