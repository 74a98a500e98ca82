"""Policies trained by reinforcement learning: a cartpole that needs no simulator, PPO for many policies, anyone's environment."""
