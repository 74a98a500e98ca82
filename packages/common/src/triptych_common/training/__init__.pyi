from .loop import (
    is_due as is_due,
    open_run as open_run,
    summary as summary,
    training_steps as training_steps,
)
from .state import Batch as Batch, TrainState as TrainState
