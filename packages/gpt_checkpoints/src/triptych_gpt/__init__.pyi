from .config import GptConfig as GptConfig
from .interop import load_released as load_released
from .layout import ParameterLayout as ParameterLayout
from .model import Gpt as Gpt
from .presets import PRESETS as PRESETS
from .prompting import (
    Answer as Answer,
    OutsideTrainedRange as OutsideTrainedRange,
    UpdatesRejected as UpdatesRejected,
    prompt as prompt,
)
from .settings import SamplerSettings as SamplerSettings
from .symmetry.derivation import Residual as Residual, derive as derive
from .symmetry.matching import canonicalise as canonicalise
from .symmetry.spec import Axis as Axis, PermutationSpec as PermutationSpec
from .tasks import Items as Items, OptimizerSettings as OptimizerSettings
from .tasks import TASKS as TASKS, SupervisedTask as SupervisedTask, Task as Task, open_task as open_task
from .trained import TrainedGpt as TrainedGpt, load as load
from .zoo.pairs import Pairs as Pairs
from .zoo.zoo import Zoo as Zoo
