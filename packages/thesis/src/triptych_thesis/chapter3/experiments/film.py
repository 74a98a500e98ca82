"""A film of one policy: before, after one update, and after being prompted for half of the return."""

from io import BytesIO
from itertools import cycle, islice

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from triptych_common.plots import INK
from triptych_gpt.evaluation.prompted import starting_metrics
from triptych_gpt.tasks.reinforcement.cartpole import Cartpole, CartpoleWorld, drawn
from triptych_gpt.tasks.reinforcement.task import ReinforcementTask

from triptych_thesis.chapter3.context import Context, named
from triptych_thesis.chapter3.sizes import CARTPOLE
from triptych_thesis.study.experiment import Experiment, Result, Section, Study

EVERY = 3  # steps of 1/60 s in a frame
HELD = 45  # steps that a failed episode's last state stays in sight
ROWS = slice(190, 330)  # of the environment's picture, in which the pole moves


def measure(context: Context) -> Result:
    """Episodes of the first unseen network and of its updates; {"none": why} for networks that balance no pole."""
    trial, name = context.trial, context.trial.metric.name
    task = trial.task
    if not (isinstance(task, ReinforcementTask) and isinstance(task.world, CartpoleWorld)):
        return {"none": f"networks of {task.name} balance no pole"}
    theta = trial.starts("test", 1)
    start = starting_metrics(task, theta, trial.metric)
    asked = [trial.best_prompt, trial.best_prompt / 2]
    updates = [trial.prompted(theta, start, prompt=prompt) for prompt in asked]
    policies = torch.cat([theta, *(update.theta for update in updates)])
    if not policies.isfinite().all():
        return {"none": "an update of the first unseen network is not finite"}
    steps = task.world.max_steps
    return {
        "metric": name, "steps": steps, "cartpole": vars(task.world.cartpole), "policies": [
            {"asked": prompt, "achieved": float(metrics[name]), "episodes": _shown(episodes, steps)}
            for prompt, metrics, episodes in zip(
                [None, *asked], [start, *(update.metrics for update in updates)], episodes_of(task, task.world, policies),
                strict=True,
            )
        ],
    }  # fmt: skip


@torch.no_grad()
def episodes_of(
    task: ReinforcementTask, world: CartpoleWorld, theta: Float[Tensor, "policies D"]
) -> list[list[Float[Tensor, "steps 4"]]]:
    """The states of each policy in the evaluation's episodes, from the first to the one that ends an episode."""
    policies, parameters = task.policies, dict(task.policies.parameters(theta))
    environments = world.evaluation(len(theta), task.episodes, theta.device, theta.dtype)
    step, states, over = environments.reset(), [environments.state.clone()], []
    for _ in range(world.max_steps - 1):
        step = environments.step(policies.greedy(policies.outputs(parameters, step.observation)))
        states.append(environments.state.clone())
        over.append(step.terminated | step.truncated)
    lengths = torch.stack(over).byte().argmax(0) + 2  # the first step that ends one, and the state before all steps
    moved = torch.stack(states).permute(2, 3, 0, 1).cpu()
    return [
        [states[:length] for states, length in zip(own, ends, strict=True)]
        for own, ends in zip(moved, lengths.tolist(), strict=True)
    ]


def _shown(episodes: list[Float[Tensor, "steps 4"]], steps: int) -> list[list[list[float]]]:
    """Position and angle, of as many episodes as the film's steps have room for."""
    room, shown = steps, []
    for states in episodes:
        if room > 0:
            shown.append([[round(x, 4), round(angle, 4)] for x, angle in states[:, [0, 2]].tolist()])
            room -= len(states) + HELD
    return shown


def film(data: Result) -> bytes:
    """An animated PNG with a row for each policy, in real time; episodes follow one another where they are shorter than the film.

    data: {"metric", "steps": of the film, "cartpole": settings, "policies": [{"asked": prompt or None, "achieved", "episodes":
    [[[position, angle], ...], ...]}]}.
    """
    cartpole = Cartpole(**data["cartpole"])
    rows = [_row(one, data, cartpole) for one in data["policies"]]
    frames = [Image.fromarray(np.concatenate(parts)) for parts in zip(*rows, strict=True)]
    palette = Image.fromarray(np.concatenate([np.asarray(frame) for frame in frames[:: len(frames) // 4]])).quantize(32)
    first, *rest = (frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames)
    out, duration_ms = BytesIO(), round(1000 * cartpole.dt * EVERY)
    first.save(out, "PNG", save_all=True, append_images=rest, duration=duration_ms, loop=0)
    return out.getvalue()


def _row(one: Result, data: Result, cartpole: Cartpole) -> list[np.ndarray]:
    """Every frame of one policy."""
    title = "before the update" if one["asked"] is None else f"after one update, asked for {one['asked']:.0f}"
    title += f": {named(data['metric'])} {one['achieved']:.0f}"
    states: list[tuple[str, list[float]]] = []
    for number, episode in enumerate(cycle(one["episodes"]), start=1):
        held = [episode[-1]] * (HELD if len(episode) < data["steps"] else 0)
        states += [(f"episode {number}", state) for state in episode] + [("failed", state) for state in held]
        if len(states) >= data["steps"]:
            break
    return [_frame(title, *state, cartpole) for state in islice(states, 0, data["steps"], EVERY)]


def _frame(title: str, now: str, state: list[float], cartpole: Cartpole) -> np.ndarray:
    position, angle = state
    image = Image.fromarray(drawn([position, 0.0, angle, 0.0], cartpole)[ROWS])
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(size=20)
    draw.text((8, 4), title, INK, font)
    draw.text((image.width - 8, 4), now, INK, font, anchor="ra")
    return np.asarray(image)


def figures(result: Result) -> dict[str, bytes]:
    return {} if "none" in result else {"film": film(result)}


def section(study: Study, result: Result) -> Section:
    title = "A policy moves"
    if "none" in result:
        return Section(title, note=f"No film: {result['none']}.")
    caption = (
        "The first unseen network before any update, after one update, and after one that asks for half of the return: the same "
        "episodes, the same noise in both updates"
    )
    return Section(title, [study.figure("film", caption)])


EXPERIMENT = Experiment(
    "film", 1.5, measure, section, figures=figures, kept=True, offered=lambda study: study.task == CARTPOLE
)
