from .measures import cross_entropy as cross_entropy, zero_one as zero_one
from .optimizers import OptimizerSettings as OptimizerSettings, momentum_sgd as momentum_sgd
from .registry import TASKS as TASKS, open_task as open_task
from .supervised import (
    Items as Items,
    Score as Score,
    SupervisedTask as SupervisedTask,
    classification as classification,
)
from .task import (
    Cohort as Cohort,
    Metric as Metric,
    Prompts as Prompts,
    Speed as Speed,
    Task as Task,
    Trajectories as Trajectories,
)
