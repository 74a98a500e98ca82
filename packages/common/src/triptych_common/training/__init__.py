"""What a training loop needs: its state, and steps with exact resume."""

from triptych_common.training.loop import is_due, steps
from triptych_common.training.state import Batch, TrainState

__all__ = ["Batch", "TrainState", "is_due", "steps"]
