"""Images to train on: named data sets, folders and Hugging Face data sets behind `open_source`, in memory by `load`."""

import lazy_loader

# What is exported stands in __init__.pyi, and is imported when first used: torch alone takes seconds.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
