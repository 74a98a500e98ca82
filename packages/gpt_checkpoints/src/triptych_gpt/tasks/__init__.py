"""Tasks: what networks are trained to do, and how. `open_task` finds one by name, or in a file of the user's."""

import lazy_loader

# The exports are listed in __init__.pyi and imported when first used: a model is trained without the networks of other tasks.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
