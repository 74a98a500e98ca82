"""Train a DiT."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from triptych_common import randomness
from triptych_common.cli import echo
from triptych_common.parallel import Ranks, process_group
from triptych_common.storage.files import write_json
from triptych_common.storage.run import RunDirectory
from triptych_common.training import Batch, TrainState, open_run, summary, training_steps

from triptych_dit.model import DiT
from triptych_dit.objective import (
    Examples,
    Objective,
    PairData,
    Pairs,
    TrainingData,
    make_validation,
    open_training_data,
    open_validation_data,
    prefetch,
)
from triptych_dit.train_config import TrainConfig
from triptych_dit.weights import FILE_NAME, facts_of, write_model


def train(config: TrainConfig, dataset: Pairs | None = None) -> dict[str, Any]:
    """Train to the end, or resume an interrupted run.

        train(TrainConfig(model=replace(PRESETS["digits"], num_classes=3), out=Path("runs/mine")), dataset)

    dataset: replaces `config.data` by (image, class) pairs of any kind: images as float (channels, height, width) in [-1, 1],
        or uint8; it has a length, and is indexed from 0.
    Returns the paths of the model file and the metrics, and the last row of the metrics.
    Raises ValueError for settings that do not fit the data, the run directory or the ranks; Interrupted after a signal.
    """
    # Imported here: the loop itself needs none of it.
    from triptych_common.data import write_unusable

    from triptych_dit.cost import step_cost
    from triptych_dit.previews import make_previews

    training_data: TrainingData
    if dataset is not None:
        training_data = PairData(dataset, config.model)
    else:
        training_data = open_training_data(config.data, config.model, out=config.out, strict=config.strict)
    if config.horizontal_flip:
        training_data.check_flips()
    held_out, facts = open_validation_data(config, training_data), {"data": training_data.identity}
    sources = {"data": training_data, "validation_data": held_out}
    contents = {name: source.contents for name, source in sources.items() if source and source.contents}
    with process_group(config.device) as ranks, contextlib.ExitStack() as stack:
        step_cost(config, ranks).check(config, ranks)
        run = stack.enter_context(open_run(config, ranks, facts, contents=contents))
        training_data.verify(ranks)
        if ranks.is_main:
            write_unusable([e for source in sources.values() for e in getattr(source, "unusable", ())], run.path)
        state = make_state(config, ranks, run, training_data)
        objective = Objective(config, training_data)
        validate = make_validation(config, held_out, run, ranks)
        keep_snapshot, preview = make_snapshots(config, run, training_data), make_previews(config, run, training_data)

        def on_step(state: TrainState) -> None:
            validate(state)
            keep_snapshot(state)
            preview(state)

        drawn: Iterator[Examples] | None = None
        ahead = 0 if ranks.device.type == "cpu" else 2  # on a CPU the thread would only compete with training

        def losses(counters: range) -> dict[str, Tensor]:
            assert drawn is not None
            total, mse, vb = objective.loss(state.parallel_model, next(drawn), ranks.device)
            return {"loss": total.mean(), "mse": mse.mean(), "vb": vb.mean()}

        for batch in training_steps(config, state, run, on_step=on_step, flops_per_sample=config.flops_per_image):
            # Begun here rather than before the loop, which first restores the checkpoint and so knows where it stands.
            drawn = drawn or prefetch(upcoming(batch, config), objective.draw, depth=ahead)
            state.update(batch, state.accumulate(batch, config.micro_batch, losses))
        save_average(run.path / FILE_NAME, config, state, training_data)
        for path in (snapshot_path(run.path, count) for count in run.recorded("snapshots") or ()):
            if not path.exists():
                echo(f"{path}: lost; only training from the start, in another --out, makes it again")
        echo(f"model: {run.path / FILE_NAME}")
        return {"model": str(run.path / FILE_NAME), **summary(run)}


def preview(config: TrainConfig) -> dict[str, Any]:
    """What --dry-run prints: the settings, the data, and what a step takes in memory and the whole run in time.

    Raises ValueError or OSError for data that cannot be used.
    """
    from triptych_common.data import DATASETS

    from triptych_dit.cost import step_cost

    found = config.resolved()
    if config.data in DATASETS or config.data.startswith("hub:") or Path(config.data).exists():
        training_data = open_training_data(config.data, config.model, out=config.out, strict=config.strict)
        found["data"] = {
            "examples": len(training_data),
            "shape": training_data.shape,
            "classes": training_data.num_classes,
        }
    else:
        found["data"] = f"{config.data}: not there yet"
    with process_group(config.device) as ranks:
        return found | {"estimate": step_cost(config, ranks, timed=True).estimate(config, ranks)}


def upcoming(first: Batch, config: TrainConfig) -> Iterator[range]:
    """Counters of every micro-batch of this rank, from the batch `first` to the end of training."""
    # Known in advance: a step takes the next counters whether or not its gradients are used.
    for done in range(0, config.total_images - first.step * first.size, first.size):
        counters = range(first.counters.start + done, first.counters.stop + done)
        for part, _ in replace(first, counters=counters).micro_batches(config.micro_batch):
            yield part


def make_state(
    config: TrainConfig, ranks: Ranks, run: RunDirectory | None = None, training_data: TrainingData | None = None
) -> TrainState:
    """The model, freshly initialised or started from another one, with its moving average and AdamW.

    training_data: compared with what a model to start from is of, and recorded in checkpoints.
    Fine-tuning reports what happened to each layer of the other model, and writes it to the run directory as init.json.
    """
    # From the run's own stream: ranks start from equal weights, whatever was drawn before.
    model = DiT(config.model)
    model.initialize_weights(randomness.generator(config.seed, "init"), embeddings=config.embedding_init)
    if config.init_from is not None:
        from triptych_dit.fine_tune import by_layer, check_meaning, start_from
        from triptych_dit.interop import load_any

        source = load_any(config.init_from, **config.loading())
        facts = {} if training_data is None else training_data.facts
        if training_data is not None:
            check_meaning(source, facts, new_latents=config.new_latents)
        became = start_from(
            model, source.model, new_class_table=config.new_class_table, names=facts.get("class_names") or (),
            source_names=source.class_names,
        )  # fmt: skip
        if run is not None and ranks.is_main and not run.metrics_path.exists():
            echo(f"start from {Path(config.init_from).name}:")
            for layer, fate in by_layer(became).items():
                echo(f"  {layer}: {fate}")
            words = {name: fate.words for name, fate in became.items()}
            write_json(run.path / "init.json", {"init_from": config.init_from, "tensors": words})
    adamw = partial(
        torch.optim.AdamW, lr=config.lr, betas=(0.9, config.adam_beta2), weight_decay=config.weight_decay, fused=True
    )
    state = TrainState(model.to(config.dtype), adamw, ranks, **config.state_options())
    state.describe = lambda: {"ema": facts_of(config.model, facts_about(config, state, training_data))}
    if config.continue_optimizer:
        from triptych_dit.interop.training import read_training

        if not all(fate.is_copy for name, fate in became.items() if name != "pos_embed"):  # which is not trained
            raise ValueError("continue_optimizer: the classes are others than the checkpoint's; leave it out")
        tensors, steps = read_training(Path(str(config.init_from)), model)
        state.load(tensors, None)
        echo(f"go on with the weights, average and AdamW's moments of step {steps:,}, and this run's learning rate")
    return state


def make_snapshots(config: TrainConfig, run: RunDirectory, training_data: TrainingData) -> Callable[[TrainState], None]:
    """The callback that saves the averaged model whenever one of the counts in `snapshots` is passed."""

    def keep(state: TrainState) -> None:
        before = state.samples_seen - config.batch_size
        for count in config.snapshots:
            if before < count <= state.samples_seen:
                save_average(snapshot_path(run.path, count), config, state, training_data)
                # A longer run's are others: what was kept, rather than what is asked for, tells one that was lost.
                run.record("snapshots", sorted({count, *(run.recorded("snapshots") or ())}))

    return keep


def save_average(path: Path, config: TrainConfig, state: TrainState, training_data: TrainingData | None = None) -> None:
    """Write the model file of the averaged weights; every rank must call it."""
    # Sharded weights are gathered from all ranks, then one of them writes.
    tensors = state.averaged()
    if state.ranks.is_main:
        write_model(path, config.model, tensors, facts_about(config, state, training_data))


def facts_about(config: TrainConfig, state: TrainState, training_data: TrainingData | None = None) -> dict[str, Any]:
    """The facts of a model file: what the network predicts, and what it was trained on."""
    facts = {"predict": config.predict, "seed": config.seed, "images_seen": state.samples_seen}
    return facts if training_data is None else {**facts, "data": training_data.identity, **training_data.facts}


def snapshot_path(run: Path, images: int) -> Path:
    return run / "snapshots" / f"images-{images:09d}.safetensors"
