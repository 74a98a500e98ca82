"""Tasks: what networks are trained to do, and how. `open_task` finds one by name, or in a file of the user's."""

import lazy_loader

# What is exported stands in __init__.pyi, and is imported when first used: a model is trained without the networks of any
# task but its own.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
