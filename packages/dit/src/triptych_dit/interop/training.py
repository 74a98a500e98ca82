"""The state of other programs' training runs: weights, their average and AdamW's moments, {model, ema, opt}."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from triptych_common.storage import foreign

from triptych_dit.interop.released import LANDMARKS

_SLOTS = ("step", "exp_avg", "exp_avg_sq")


def read_training(path: Path, model: nn.Module) -> tuple[dict[str, Tensor], int]:
    """Tensors of a training checkpoint, by the names that `TrainState.load` takes, and the steps taken.

    An optimiser of torch numbers its parameters, in the order of the module's, which is that of the state dict beside it.
    Raises ValueError for a file without optimiser state, or that of another model.
    """
    if not path.is_file():
        raise ValueError(
            f"{path}: no training checkpoint of facebookresearch/DiT with `opt`; leave --continue-optimizer out"
        )
    trained = foreign.state_dict(path, holds=LANDMARKS, prefer="model")
    average = foreign.network_in(trained.content, holds=LANDMARKS)
    optimizer = next((trained.content[name] for name in ("opt", "optimizer") if name in trained.content), None)
    try:
        slots = _by_name(optimizer, list(trained.tensors), model)
    except (LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: has no state of AdamW as `opt`; leave --continue-optimizer out") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}; leave --continue-optimizer out") from error
    ours, tensors = model.state_dict(), dict[str, Tensor]()
    for part, state in (("model", trained.tensors), ("ema", average.tensors)):
        # A label table that was fitted to other classes, or another grid, has no moments there.
        other = [name for name, tensor in ours.items() if name not in state or state[name].shape != tensor.shape]
        if set(other) - {"pos_embed"} or ours.keys() - {"pos_embed"} != state.keys() - {"pos_embed"}:
            raise ValueError(f"{path}: this run's model is of another shape; leave --continue-optimizer out")
        tensors |= {f"{part}.{name}": state.get(name, tensor) for name, tensor in ours.items()}
    steps = max(int(value) for name, value in slots.items() if name.startswith("optimizer.step."))
    return tensors | slots, steps


def _by_name(optimizer: Any, names: list[str], model: nn.Module) -> dict[str, Tensor]:
    groups, states = optimizer["param_groups"], optimizer["state"]
    numbers = [number for group in groups for number in group["params"]]
    trainable = dict(model.named_parameters())
    for order in (names, [name for name in names if name != "pos_embed"]):  # some scripts pass on what is trained alone
        if len(order) == len(numbers):
            break
    else:
        raise ValueError(f"its optimiser has {len(numbers)} parameters, its model {len(names)}")
    found: dict[str, Tensor] = {}
    for number, name in zip(numbers, order, strict=True):
        for slot in _SLOTS if number in states else ():
            value = torch.as_tensor(states[number][slot], dtype=torch.float32)
            if slot != "step" and value.shape != trainable[name].shape:
                raise ValueError(f"its optimiser has {tuple(value.shape)} for {name} {tuple(trainable[name].shape)}")
            found[f"optimizer.{slot}.{name}"] = value
    if not found:
        raise ValueError("its optimiser has not taken a step")
    return found
