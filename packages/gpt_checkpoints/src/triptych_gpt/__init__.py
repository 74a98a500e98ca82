"""Zoos of neural-network checkpoints, and G.pt, a generative model of them."""

import lazy_loader

# The exports are listed in __init__.pyi and imported when first used: torch alone takes seconds.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
