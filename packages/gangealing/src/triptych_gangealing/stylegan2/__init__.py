"""StyleGAN2: generator and discriminator, their training, and files of theirs in all common formats."""
