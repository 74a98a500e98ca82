"""How well updates follow prompts: sweeps, prompt alignment, trivial baselines, and trials of a trained model."""
