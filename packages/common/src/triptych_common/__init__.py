"""What the three panels of triptych share: a transformer core, diffusion, training, data, metrics and reports."""
