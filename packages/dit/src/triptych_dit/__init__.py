"""Diffusion transformers for images."""

import lazy_loader

# The exports are listed in __init__.pyi and imported on first use: torch alone takes seconds.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
