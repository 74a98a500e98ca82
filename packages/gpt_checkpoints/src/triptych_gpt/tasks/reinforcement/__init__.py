"""Policies trained by reinforcement learning: a cartpole that needs no simulator, PPO for many policies, anyone's environment."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
