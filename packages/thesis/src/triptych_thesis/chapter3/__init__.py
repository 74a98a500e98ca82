"""Chapter 3: diffusion over checkpoints of neural networks."""
