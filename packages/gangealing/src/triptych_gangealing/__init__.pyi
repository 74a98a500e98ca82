from .digits32 import Digits32 as Digits32
from .stylegan2.augment import augment as augment
from .stylegan2.config import DiscriminatorConfig as DiscriminatorConfig, GeneratorConfig as GeneratorConfig
from .stylegan2.discriminator import Discriminator as Discriminator
from .stylegan2.generator import Generator as Generator
from .stylegan2.interop import load_discriminator as load_discriminator, load_generator as load_generator
from .stylegan2.pickles import load_pickle as load_pickle
from .stylegan2.train_config import PRESETS as PRESETS, GanTrainConfig as GanTrainConfig
