"""What the gpt suites compare: the networks of a cohort trained and scored by us, one after another in eager PyTorch, and by
`torch.func`, from the same weights, on the same minibatches, recorded after the same steps.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F
from triptych_gpt.tasks import Cohort, Items, SupervisedTask
from triptych_gpt.tasks.supervised import recorded_steps

Train = Callable[[SupervisedTask, Cohort, torch.device], Tensor]
"""The cohort's trajectories [runs, checkpoints, D], on the CPU."""
Score = Callable[[SupervisedTask, Tensor], Tensor]
"""(task, theta [n, D]) -> the task's metrics [metrics, n]: loss and error on test items, loss on training items."""


def ours(at_once: int) -> Train:
    """Training as `triptych-gpt collect` does it, so many networks at once."""

    def train(task: SupervisedTask, cohort: Cohort, device: torch.device) -> Tensor:
        return task.train_cohort(cohort, device, at_once).theta

    return train


def one_by_one(task: SupervisedTask, cohort: Cohort, device: torch.device) -> Tensor:
    """A module and an optimiser for each network, one network after another; each loads its minibatches anew."""
    train, record = _items(task, "train", device), recorded_steps(cohort, task.steps).tolist()
    theta = torch.empty(len(cohort.runs), cohort.checkpoints, task.layout.size)
    for run, due, out in zip(cohort.runs, record, theta, strict=True):
        network, place = task.network().to(device), {step: at for at, step in enumerate(due)}
        network.load_state_dict(task.layout.unflatten(task.initial(cohort.seed, [run], cohort.initialiser)[0]))
        optimizer = torch.optim.SGD(network.parameters(), **task.optimizer.arguments)
        out[0] = nn.utils.parameters_to_vector(network.parameters()).detach()
        for step, inputs, targets in _minibatches(task, train, cohort, range(run, run + 1), optimizer):
            optimizer.zero_grad()
            shared = cohort.shared_batches
            F.cross_entropy(network(inputs if shared else inputs[0]), targets if shared else targets[0]).backward()
            optimizer.step()
            if step in place:
                out[place[step]] = nn.utils.parameters_to_vector(network.parameters()).detach()
    return theta


def vmapped(task: SupervisedTask, cohort: Cohort, device: torch.device) -> Tensor:
    """All networks at once, by `vmap` of the gradient of one network's loss."""
    network, train, record = (
        task.network().to(device),
        _items(task, "train", device),
        recorded_steps(cohort, task.steps),
    )
    start = task.initial(cohort.seed, cohort.runs, cohort.initialiser).to(device)
    parameters = {name: value.contiguous() for name, value in task.layout.unflatten(start.clone()).items()}

    def loss(parameters: dict[str, Tensor], inputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(network, parameters, inputs), targets)

    batch_dim = None if cohort.shared_batches else 0
    gradients = vmap(grad(loss), in_dims=(0, batch_dim, batch_dim))
    optimizer = torch.optim.SGD(list(parameters.values()), **task.optimizer.arguments, fused=True)
    theta = torch.empty(len(cohort.runs), cohort.checkpoints, task.layout.size)
    theta[:, 0] = start.cpu()
    for step, inputs, targets in _minibatches(task, train, cohort, cohort.runs, optimizer):
        for name, gradient in gradients(parameters, inputs, targets).items():
            parameters[name].grad = gradient.contiguous()  # fused SGD reads memory in order, whatever the strides
        optimizer.step()
        networks, checkpoints = (record == step).nonzero(as_tuple=True)
        if len(networks):
            rows = [value.detach()[networks.to(device)].flatten(1) for value in parameters.values()]
            theta[networks, checkpoints] = torch.cat(rows, 1).cpu()
    return theta


def score_ours(task: SupervisedTask, theta: Tensor) -> Tensor:
    return torch.stack(list(task.evaluate(theta).values()))


@torch.inference_mode()
def score_one_by_one(task: SupervisedTask, theta: Tensor) -> Tensor:
    """A module that takes each checkpoint's weights in turn, and 1,000 items at a time."""
    network = task.network().to(theta.device)
    test, train = (_scored(task, part, theta.device) for part in ("test", "train"))

    def outputs_and_loss(items: Items) -> tuple[Tensor, Tensor]:
        outputs = torch.cat([network(inputs) for inputs in items.inputs.split(1000)])
        return outputs, F.cross_entropy(outputs, items.targets)

    found = []
    for row in theta:
        network.load_state_dict(task.layout.unflatten(row))
        outputs, loss = outputs_and_loss(test)
        error = (outputs.argmax(1) != test.targets).float().mean()
        found.append(torch.stack([loss, error, outputs_and_loss(train)[1]]))
    return torch.stack(found, 1)


def score_vmapped(items_at_once: int) -> Score:
    """`vmap` of one network's loss and errors, 16 networks and some items at a time: all at once leaves the cache."""

    @torch.inference_mode()
    def score(task: SupervisedTask, theta: Tensor) -> Tensor:
        network = task.network().to(theta.device)

        def totals(parameters: dict[str, Tensor], inputs: Tensor, targets: Tensor) -> Tensor:
            outputs = functional_call(network, parameters, inputs)
            loss = F.cross_entropy(outputs, targets, reduction="sum")
            return torch.stack([loss, (outputs.argmax(1) != targets).float().sum()])

        every, parts = vmap(totals, in_dims=(0, None, None)), []
        for part in ("test", "train"):
            items = _scored(task, part, theta.device)
            blocks = list(zip(items.inputs.split(items_at_once), items.targets.split(items_at_once), strict=True))
            sums = [sum(every(task.layout.unflatten(some), *block) for block in blocks) for some in theta.split(16)]
            parts.append(torch.cat(sums).T / len(items.inputs))
        (test_loss, test_error), (train_loss, _) = parts
        return torch.stack([test_loss, test_error, train_loss])

    return score


def _minibatches(
    task: SupervisedTask, train: Items, cohort: Cohort, runs: range, optimizer: torch.optim.Optimizer
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Number of each step, from 1, and its minibatch; sets its learning rate."""
    for step, (inputs, targets) in enumerate(task.minibatches(train, cohort, runs), start=1):
        for group in optimizer.param_groups:
            group["lr"] = task.optimizer.rate((step - 1) // task.steps_per_epoch, task.epochs)
        yield step, inputs, targets


def _items(task: SupervisedTask, part: str, device: torch.device) -> Items:
    return task.items[part].to(device, torch.float32)


def _scored(task: SupervisedTask, part: str, device: torch.device) -> Items:
    return task.scored[part].to(device, torch.float32)
