"""Initialisers of a network's weights.  [thesis 3.4.3]

All but the network's own ("default") sample every weight of two or more dimensions and set its layer's biases to zero, as the
papers that introduced them do: Glorot and Bengio 2010 (Xavier), He et al. 2015 (Kaiming), Saxe et al. 2014 (orthogonal).
Normalisation, and other layers without such a weight, start as they always do.
"""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from triptych_common.randomness import generator

from triptych_gpt.layout import ParameterLayout


def _orthogonal_uniform(weight: Tensor) -> None:
    """The orthogonal factor of a matrix of uniform entries, with signs as `nn.init.orthogonal_` fixes them for normal ones."""
    rows = weight.flatten(1)
    wide = rows.shape[0] < rows.shape[1]
    q, r = torch.linalg.qr(torch.empty_like(rows.T if wide else rows).uniform_(-1, 1))
    q = q * r.diagonal().sign()
    with torch.no_grad():
        weight.copy_((q.T if wide else q).view_as(weight))


_DRAWS: dict[str, Callable[[Tensor], object]] = {
    "xavier_uniform": nn.init.xavier_uniform_,
    "xavier_normal": nn.init.xavier_normal_,
    "kaiming_uniform": lambda weight: nn.init.kaiming_uniform_(weight, nonlinearity="relu"),
    "kaiming_normal": lambda weight: nn.init.kaiming_normal_(weight, nonlinearity="relu"),
    "orthogonal_uniform": _orthogonal_uniform,
    "orthogonal_normal": nn.init.orthogonal_,
}
INITIALISERS = ("default", *_DRAWS)


def initial_networks(
    network: Callable[[], nn.Module], seed: int, runs: Sequence[int], initialiser: str = "default"
) -> Float[Tensor, "runs D"]:
    """theta of a new network for each run, a function of (seed, run). Raises ValueError for an unknown initialiser."""
    if initialiser not in INITIALISERS:
        raise ValueError(f"initialiser {initialiser!r}: expected one of {', '.join(INITIALISERS)}")
    thetas = []
    with torch.random.fork_rng(devices=[]):  # modules use the global generator
        for run in runs:
            # Not torch.manual_seed, which would also seed every GPU's generator.
            torch.default_generator.manual_seed(generator(seed, f"init-{initialiser}", run).initial_seed())
            built = network()
            if initialiser != "default":
                _draw(built, _DRAWS[initialiser])
            thetas.append(ParameterLayout.of(built).flatten(built.state_dict()))
    return torch.stack(thetas).float()


def _draw(network: nn.Module, draw: Callable[[Tensor], object]) -> None:
    for module in network.modules():
        own = list(module.parameters(recurse=False))
        # The weights of these norms may have two dimensions, too.
        if isinstance(module, nn.LayerNorm | nn.RMSNorm) or all(parameter.ndim < 2 for parameter in own):
            continue
        for parameter in own:
            if parameter.ndim > 1:
                draw(parameter)
            else:
                nn.init.zeros_(parameter)
