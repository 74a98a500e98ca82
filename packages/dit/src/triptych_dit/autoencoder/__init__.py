"""Autoencoders: images to latents and back, their training, and caches of latents."""
