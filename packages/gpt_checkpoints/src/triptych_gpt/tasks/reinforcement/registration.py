"""Registers the environments with gymnasium when it is imported, itself or by gymnasium; it loads no torch.

gymnasium.make("triptych_gpt.tasks.reinforcement.registration:triptych/Cartpole-v0")
"""

from gymnasium.envs.registration import register, registry

CARTPOLE_ID = "triptych/Cartpole-v0"
_MODULE = "triptych_gpt.tasks.reinforcement.gymnasium_cartpole"

if CARTPOLE_ID not in registry:
    register(CARTPOLE_ID, f"{_MODULE}:CartpoleEnv", vector_entry_point=f"{_MODULE}:CartpoleVectorEnv")
