"""Encoders and the perceptual distances made of them."""
