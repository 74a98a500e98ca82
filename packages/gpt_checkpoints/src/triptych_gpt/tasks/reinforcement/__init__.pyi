from .cartpole import Cartpole as Cartpole, CartpoleBatch as CartpoleBatch, CartpoleWorld as CartpoleWorld
from .environments import (
    Continuous as Continuous,
    Discrete as Discrete,
    Environments as Environments,
    Step as Step,
    World as World,
)
from .gymnasium_world import GymnasiumWorld as GymnasiumWorld
from .policies import Policies as Policies, Selu as Selu
from .ppo import PpoSettings as PpoSettings
from .task import CARTPOLE as CARTPOLE, CARTPOLE_SMALL as CARTPOLE_SMALL, ReinforcementTask as ReinforcementTask
