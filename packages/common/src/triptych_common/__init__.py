"""What the three panels of triptych share: a transformer core, diffusion, training, storage, data and metrics."""
