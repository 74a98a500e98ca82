"""Pairs of images whose corresponding points are known."""

from triptych_gangealing.keypoints.synthetic import Pairs, pairs

__all__ = ["Pairs", "pairs"]
