"""StyleGAN2 in plain PyTorch, and visual alignment learned from it."""
