from .loop import is_due as is_due, steps as steps
from .state import Batch as Batch, TrainState as TrainState
