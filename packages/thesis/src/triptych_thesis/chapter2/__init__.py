"""Chapter 2: diffusion transformers for images."""
