"""StyleGAN2: generator and discriminator, their training, and everybody's files of them."""
