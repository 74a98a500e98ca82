"""What a training loop needs: its state, and steps with exact resume."""

from triptych_common.training.loop import is_due, open_run, steps, summary, training_steps
from triptych_common.training.state import Batch, TrainState

__all__ = ["Batch", "TrainState", "is_due", "open_run", "steps", "summary", "training_steps"]
