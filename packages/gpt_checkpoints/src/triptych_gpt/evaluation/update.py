"""What an experiment needs of a generative model: updates of networks towards prompts, as one function."""

from collections.abc import Callable, Sequence

from torch import Tensor

Update = Callable[[Tensor, Tensor, Tensor, Sequence[int]], Tensor]
"""(theta [n, D], metric [n], target [n], indices) -> theta_star [n, D], in the networks' own units: one update of each network,
whose metric is known, towards a prompted one. indices number the samples: noise follows from them, not from the batch.
"""
