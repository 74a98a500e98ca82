from .aligner import Aligner as Aligner, Alignment as Alignment, load_aligner as load_aligner
from .digits32 import Digits32 as Digits32
from .keypoints.pck import PckTable as PckTable, pck as pck
from .pictures import Picture as Picture, align as align, correspond as correspond
from .config import SpatialTransformerConfig as SpatialTransformerConfig
from .spatial_transformer import SpatialTransformer as SpatialTransformer
from .stylegan2.augment import augment as augment
from .stylegan2.config import DiscriminatorConfig as DiscriminatorConfig, GeneratorConfig as GeneratorConfig
from .stylegan2.discriminator import Discriminator as Discriminator
from .stylegan2.generator import Generator as Generator
from .stylegan2.pickles import load_pickle as load_pickle
from .stylegan2.train_config import PRESETS as PRESETS, GanTrainConfig as GanTrainConfig
from .stylegan2.weights import load_discriminator as load_discriminator, load_generator as load_generator
from .warp import Affine as Affine, Flow as Flow, Warp as Warp
