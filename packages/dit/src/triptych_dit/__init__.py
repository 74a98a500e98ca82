"""Diffusion transformers for images.  [thesis 2]"""

import lazy_loader

# What is exported stands in __init__.pyi, and is imported when first used: torch alone takes seconds.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
