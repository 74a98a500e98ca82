"""Scores of generated images: distances between feature distributions, precision and recall, digits, the ADM suite."""

import lazy_loader

# The exports are listed in __init__.pyi and imported on first use: torch alone takes seconds.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
