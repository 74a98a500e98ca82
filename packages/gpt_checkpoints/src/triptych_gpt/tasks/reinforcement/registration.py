"""Registers the environments with gymnasium; imports nothing itself."""

CARTPOLE_ID = "triptych/Cartpole-v0"


def register() -> None:
    """Make `gymnasium.make("triptych/Cartpole-v0")` and `make_vec` work."""
    from gymnasium.envs.registration import register, registry

    module = "triptych_gpt.tasks.reinforcement.gymnasium_cartpole"
    if CARTPOLE_ID not in registry:
        register(CARTPOLE_ID, f"{module}:CartpoleEnv", vector_entry_point=f"{module}:CartpoleVectorEnv")
