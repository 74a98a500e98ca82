from .config import PRESETS as PRESETS, DiTConfig as DiTConfig
from .flops import gflops as gflops
from .interop import from_diffusers as from_diffusers, load_released as load_released, to_diffusers as to_diffusers
from .model import DiT as DiT
from .sampling import sample_images as sample_images
from .settings import SamplerSettings as SamplerSettings
from .weights import TrainedModel as TrainedModel, load_model as load_model
