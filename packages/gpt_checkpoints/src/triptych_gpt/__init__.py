"""Zoos of neural-network checkpoints, and generative models of them."""
