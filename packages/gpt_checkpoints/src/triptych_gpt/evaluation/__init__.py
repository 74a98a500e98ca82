"""How well updates obey prompts: sweeps, alignment, and baselines that learn nothing."""
