from .config import PRESETS as PRESETS, DiTConfig as DiTConfig
from .flops import gflops as gflops
from .interop import from_diffusers as from_diffusers, load_released as load_released, to_diffusers as to_diffusers
from .model import DiT as DiT
from .objective import Objective as Objective
from .sampling import sample_images as sample_images
from .settings import SamplerSettings as SamplerSettings
from .train import (
    TrainState as TrainState,
    make_state as make_state,
    open_run as open_run,
    process_group as process_group,
    save_average as save_average,
    training_steps as training_steps,
)
from .train_config import TrainConfig as TrainConfig
from .weights import (
    TrainedModel as TrainedModel,
    load_model as load_model,
    make_diffusion as make_diffusion,
    save_model as save_model,
)
