import json
import math
import os
import re
import signal
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from triptych_common import randomness
from triptych_common.cli import Diverged, Interrupted
from triptych_common.parallel import Execution, Ranks, gradient_sync
from triptych_common.progress import Progress, duration
from triptych_common.storage import checkpoint
from triptych_common.storage.run import RunDirectory
from triptych_common.testing import one_thread
from triptych_common.training import Batch, TrainState, is_due, loop, training_steps
from triptych_common.training.settings import LoopSettings

ALONE = Ranks(0, 1, torch.device("cpu"))


@dataclass(frozen=True)
class Settings(LoopSettings):
    total_images: int = 80
    batch_size: int = 8
    checkpoint_every: int = 4
    log_every: int = 3


def make_state(**kwargs):
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    rng = torch.Generator().manual_seed(0)
    for p in model.parameters():
        nn.init.normal_(p, std=0.5, generator=rng)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    return TrainState(model, optimizer, ALONE, **{"ema_half_life": 40.0, **kwargs})


def loss_of(state, counters, dtype=torch.float64):
    x = randomness.normal(0, "x", counters, (3,), dtype=dtype)
    return ((state.model(x)[:, 0] - x.sum(1)) ** 2).mean()


def run_loop(
    state,
    path,
    *,
    total=80,
    after=lambda state: None,
    micro=None,
    spoil=lambda step: False,
    dtype=torch.float64,
    flops=None,
):
    """A complete small training loop; returns its metrics except those of time and memory."""
    with RunDirectory(path, {"test": 1}, device="cpu") as run:
        for batch in training_steps(Settings(total_images=total), state, run, flops_per_sample=flops):
            total_loss = 0.0
            for counters, last in batch.micro_batches(micro):
                with gradient_sync(state.parallel_model, last):
                    loss = loss_of(state, counters, dtype) * len(counters) / len(batch.counters)
                    if spoil(batch.step):
                        loss = loss * math.nan
                    loss.backward()
                total_loss = total_loss + loss.detach()
            state.update(batch, {"loss": total_loss})
            after(state)
        return [{k: v for k, v in row.items() if not k.startswith(("time/", "memory/"))} for row in run.metrics()]


def same(a, b):
    return a.tensors().keys() == b.tensors().keys() and all(
        torch.equal(value, b.tensors()[name]) for name, value in a.tensors().items()
    )


def test_a_run_interrupted_anywhere_ends_bit_identical(tmp_path):
    whole = make_state()
    expected = run_loop(whole, tmp_path / "whole")
    for stop_at in (1, 4, 7):
        path = tmp_path / f"stopped-{stop_at}"

        def send_signal(state, stop_at=stop_at):
            if state.step == stop_at:
                os.kill(os.getpid(), signal.SIGTERM)

        with pytest.raises(Interrupted, match=f"stopped at step {stop_at} of 10.*repeat the command") as stop:
            run_loop(make_state(), path, after=send_signal)
        assert stop.value.exit_code == 143
        resumed = make_state()
        assert run_loop(resumed, path) == expected
        assert same(resumed, whole)
        assert contents(path) == contents(tmp_path / "whole")


def contents(run):
    """Every file of a run, but for logs of time: checkpoints by the hash of their tensors and state."""
    paths = [
        path
        for path in run.rglob("*")
        if path.is_file() and path.name not in ("metrics.jsonl", ".metrics.crc32", ".lock")
    ]
    return {
        str(path.relative_to(run)): checkpoint.content_sha256(path)
        if path.suffix == ".safetensors"
        else path.read_bytes()
        for path in paths
    }


def test_another_number_of_threads_is_told_where_a_run_goes_on(tmp_path, capsys):
    def stop(state):
        if state.step == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    with one_thread(), pytest.raises(Interrupted):
        run_loop(make_state(), tmp_path, after=stop)
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["device"], config["hardware"]["threads"]) == ("cpu", 1)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        run_loop(make_state(), tmp_path)
        told = "thread count is 2, the run had 1: results may differ in the last digits; set OMP_NUM_THREADS=1"
        assert told in capsys.readouterr().out
        run_loop(make_state(), tmp_path)  # finished: nothing is computed any more
    finally:
        torch.set_num_threads(before)
    assert "thread count" not in capsys.readouterr().out


def test_metrics_beyond_the_checkpoint_are_cut_back(tmp_path):
    expected = run_loop(make_state(), tmp_path / "whole")

    class Crash(Exception):
        pass

    def crash(state):
        if state.step == 7:  # the checkpoint is of step 4, a row of step 6 is written
            raise Crash

    with pytest.raises(Crash):
        run_loop(make_state(), tmp_path / "run", after=crash)
    assert [json.loads(line)["step"] for line in (tmp_path / "run/metrics.jsonl").open()] == [3, 6]
    with (tmp_path / "run/metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "lo')  # killed in the middle of a row
    assert run_loop(make_state(), tmp_path / "run") == expected


def test_a_finished_run_does_nothing_more(tmp_path):
    first = make_state()
    rows = run_loop(first, tmp_path)
    again = make_state()
    assert run_loop(again, tmp_path) == rows
    assert same(first, again)


def test_accumulated_micro_batches_equal_the_whole_batch(tmp_path):
    whole, parts = make_state(), make_state()
    run_loop(whole, tmp_path / "a")
    run_loop(parts, tmp_path / "b", micro=3)
    for a, b in zip(whole.model.parameters(), parts.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-13)


def test_average_has_its_closed_form():
    state = make_state(ema_half_life=16.0, ema_rampup=None, learning_rate=lambda seen: 0.01)
    expected = [p.detach().clone() for p in state.model.parameters()]
    for step in range(6):
        batch = Batch(step, 8, range(8 * step, 8 * step + 8))
        loss_of(state, batch.counters).backward()
        state.update(batch, {})
        decay = 0.5 ** (8 / 16)  # one half-life is two steps
        expected = [
            decay * e + (1 - decay) * p.detach() for e, p in zip(expected, state.model.parameters(), strict=True)
        ]
    for e, p in zip(expected, state.ema.parameters(), strict=True):
        torch.testing.assert_close(p, e, rtol=0, atol=1e-14)


def test_rampup_forgets_the_random_start():
    """With a half-life of a tenth of the samples seen, the share of the start vanishes however short the run."""
    state = make_state(ema_half_life=1e9, ema_rampup=0.1)
    start = [p.clone() for p in state.ema.parameters()]
    with torch.no_grad():
        for p in state.model.parameters():
            p.zero_()
    for step in range(100):
        state._average(8)
        state.samples_seen += 8
        state.step = step
    for before, now in zip(start, state.ema.parameters(), strict=True):
        assert float(now.abs().max()) < 1e-6 * float(before.abs().max())


def test_clipping_bounds_the_norm_and_is_metered(tmp_path):
    state = make_state(grad_clip=1e-3)
    rows = run_loop(state, tmp_path, total=24)
    assert rows[0]["grad_norm"] > 1e-3  # logged before clipping

    free = make_state(grad_clip=None)
    state = make_state(grad_clip=0.05)
    for one in (free, state):
        one.optimizer = torch.optim.SGD(one.model.parameters(), lr=1.0)
        before = [p.detach().clone() for p in one.model.parameters()]
        loss_of(one, range(8)).backward()
        one.update(Batch(0, 8, range(8)), {})
        moved = math.sqrt(
            sum(float(((p.detach() - b) ** 2).sum()) for p, b in zip(one.model.parameters(), before, strict=True))
        )
        assert (moved > 0.06) if one is free else moved == pytest.approx(0.05, rel=1e-4)


def test_a_bad_batch_is_skipped_and_counted_but_its_samples_stay_seen(tmp_path):
    state = make_state()
    rows = run_loop(state, tmp_path, spoil=lambda step: step == 2)
    assert (state.skipped, state.rollbacks, state.samples_seen, state.step) == (1, 0, 80, 10)
    assert rows[-1]["skipped"] == 1
    assert all(math.isfinite(float(p.detach().sum())) for p in state.model.parameters())


def test_bad_batches_in_a_row_roll_weights_back_never_the_counter(tmp_path):
    state = make_state()
    after_step, seen = {}, []

    def remember(state):
        after_step[state.step] = {name: value.clone() for name, value in state.tensors().items()}
        seen.append(state.samples_seen)

    run_loop(state, tmp_path, total=72, after=remember, spoil=lambda step: step in (6, 7, 8))  # steps 7, 8, 9 of 9
    assert (state.rollbacks, state.skipped) == (1, 3)
    assert seen == [8 * (i + 1) for i in range(9)]  # every sample counter is visited once
    weights = {name: value for name, value in state.tensors().items() if not name.startswith("meter.")}
    assert any(not torch.equal(value, after_step[6][name]) for name, value in weights.items())  # step 6 is undone
    for name, value in weights.items():
        assert torch.equal(value, after_step[4][name]), name  # back at the checkpoint


def test_an_interruption_before_a_roll_back_changes_nothing(tmp_path):
    def bad(step):
        return step in (6, 7, 8)

    whole = make_state()
    expected = run_loop(whole, tmp_path / "whole", spoil=bad)

    def send_signal(state):
        if state.step in (6, 8):
            os.kill(os.getpid(), signal.SIGTERM)

    for _ in range(2):
        with pytest.raises(Interrupted):
            run_loop(make_state(), tmp_path / "stopped", spoil=bad, after=send_signal)
    resumed = make_state()
    assert run_loop(resumed, tmp_path / "stopped", spoil=bad) == expected
    assert same(resumed, whole)


def test_weights_that_are_not_finite_are_never_a_checkpoint(tmp_path):
    state = make_state()

    def break_weights(state):
        if state.step == 8:
            with torch.no_grad():
                next(state.model.parameters()).fill_(math.inf)

    run_loop(state, tmp_path, total=160, after=break_weights)
    assert state.rollbacks == 1
    assert state.is_finite()
    for path in checkpoint.steps_in(tmp_path / "checkpoints"):
        assert all(bool(torch.isfinite(value).all()) for value in checkpoint.read(path)[0].values())


def test_a_roll_back_that_does_not_help_goes_one_checkpoint_farther(tmp_path):
    """Weights that explode while still finite are saved like good ones; the previous checkpoint is tried next."""
    state = make_state()

    def explode(state):
        if state.step == 8:
            with torch.no_grad():
                for p in state.model.parameters():
                    p.fill_(1e200)

    run_loop(state, tmp_path, total=160, after=explode)
    assert state.rollbacks == 2
    assert max(float(p.detach().abs().max()) for p in state.model.parameters()) < 10


def test_a_loss_that_stays_bad_stops_with_a_report_and_the_last_good_checkpoint(tmp_path):
    state = make_state()
    with pytest.raises(Diverged, match=r"after 3 rollbacks .* lower --lr. Went back as far as .*step-00000000"):
        run_loop(state, tmp_path, total=800, spoil=lambda step: step >= 5)
    tensors, counters = checkpoint.read(tmp_path / "checkpoints/step-00000004.safetensors")
    assert counters["step"] == 4
    assert all(bool(torch.isfinite(t).all()) for t in tensors.values())


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    run_loop(make_state(), tmp_path, total=8)
    other = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1)).double()
    state = TrainState(other, torch.optim.AdamW(other.parameters()), ALONE, ema_half_life=1.0)
    with pytest.raises(ValueError, match=r"does not fit this config \(0.weight is \(4, 3\), expected \(5, 3\)\)"):
        run_loop(state, tmp_path)


def test_a_batch_that_ranks_do_not_divide_is_refused(tmp_path):
    state = make_state()
    state.ranks = Ranks(0, 3, torch.device("cpu"))
    with (
        RunDirectory(tmp_path, {}) as run,
        pytest.raises(ValueError, match="batch_size 8 does not divide over 3 ranks"),
    ):
        next(training_steps(Settings(), state, run))


def test_learning_rate_follows_samples_seen(tmp_path):
    state = make_state(learning_rate=lambda seen: 1e-3 * seen)
    rates = []
    run_loop(state, tmp_path, after=lambda s: rates.append(s.optimizer.param_groups[0]["lr"]))
    assert rates == pytest.approx([8e-3 * i for i in range(10)])


def run_in_bfloat16(path, **kwargs):
    """The same small loop under autocast, with float32 weights."""
    state = make_state()
    state.model.float()
    optimizer = torch.optim.AdamW(state.model.parameters(), lr=0.01)
    state = TrainState(state.model, optimizer, ALONE, ema_half_life=40.0, execution=Execution(precision="bf16"))
    return state, run_loop(state, path, dtype=torch.float32, **kwargs)


def test_a_run_in_bfloat16_resumes_bit_identical(tmp_path):
    whole, expected = run_in_bfloat16(tmp_path / "whole")

    def send_signal(state):
        if state.step == 6:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted):
        run_in_bfloat16(tmp_path / "stopped", after=send_signal)
    resumed, rows = run_in_bfloat16(tmp_path / "stopped")
    assert rows == expected
    assert same(resumed, whole)
    assert all(p.dtype == torch.float32 for p in [*whole.model.parameters(), *whole.ema.parameters()])


def test_rows_hold_throughput_and_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "peak_flops", lambda device, precision: 1e12)
    run_loop(make_state(), tmp_path / "plain", total=24)
    run_loop(make_state(), tmp_path / "reported", total=24, flops=3e9)
    plain, reported = (json.loads((tmp_path / name / "metrics.jsonl").read_text()) for name in ("plain", "reported"))
    assert not {"time/tflops", "time/mfu"} & plain.keys()
    assert plain["memory/peak_bytes"] > 1e7
    assert reported["time/tflops"] == pytest.approx(reported["time/images_per_second"] * 3e9 / 1e12, rel=1e-3)
    assert reported["time/mfu"] == pytest.approx(reported["time/tflops"], rel=1e-3)


# --- several passes a step, as in adversarial training


def two_players(**options):
    """A small model of two parts, each with its own passes; the average of the second part is kept."""
    model = nn.ModuleDict({"critic": nn.Linear(3, 1), "painter": nn.BatchNorm1d(3)}).double()
    rng = torch.Generator().manual_seed(0)
    for p in model.parameters():
        nn.init.normal_(p, std=0.5, generator=rng)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    settings = {"ema_half_life": 16.0, "ema_rampup": None, "grad_clip": None, **options}
    return TrainState(model, optimizer, ALONE, averaged_part="painter", several_passes=True, **settings)


def play(state, batch, *, spoil=()):
    """A step of two passes; returns the results of `optimise`."""
    x = randomness.normal(0, "x", batch.counters, (3,), dtype=torch.float64)
    said = []
    for part in ("critic", "painter"):
        loss = state.model["critic"](state.model["painter"](x)).square().mean()
        gradients = torch.autograd.grad(loss, list(state.model[part].parameters()))
        for p, gradient in zip(state.model[part].parameters(), gradients, strict=True):
            p.grad = gradient * (math.nan if part in spoil else 1)
        said.append(state.optimise())
    state.count(batch, {"loss": loss.detach()}, all(finite for _, finite in said))
    return said


def batch_of(step):
    return Batch(step, 8, range(8 * step, 8 * step + 8))


def test_each_pass_moves_its_own_part_and_one_count_ends_the_step():
    state = two_players()
    before = {name: value.clone() for name, value in state.model.named_parameters()}
    x = randomness.normal(0, "x", range(8), (3,), dtype=torch.float64)
    loss = state.model["critic"](state.model["painter"](x)).square().mean()
    expected = torch.autograd.grad(loss, list(state.model["critic"].parameters()))
    (norm, finite), (_, also) = play(state, batch_of(0))
    assert (finite, also) == (True, True)
    assert float(norm) == pytest.approx(math.sqrt(sum(float(g.square().sum()) for g in expected)))
    for (name, p), gradient in zip(state.model["critic"].named_parameters(), expected, strict=True):
        torch.testing.assert_close(p, before[f"critic.{name}"] - 0.1 * gradient, rtol=0, atol=1e-14)
    assert all(not torch.equal(p, before[f"painter.{name}"]) for name, p in state.model["painter"].named_parameters())
    assert all(p.grad is None for p in state.model.parameters())
    assert (state.step, state.samples_seen, state.metered_steps) == (1, 8, 1)
    assert state.parallel_model is state.model


def test_the_average_is_of_the_named_part_alone_with_its_buffers():
    state = two_players()
    expected = {name: value.clone() for name, value in state.model["painter"].named_parameters()}
    assert state.ema.state_dict().keys() == state.model["painter"].state_dict().keys()
    for step in range(4):
        play(state, batch_of(step))
        for name, p in state.model["painter"].named_parameters():
            expected[name] = expected[name] * 0.5**0.5 + p.detach() * (1 - 0.5**0.5)  # two steps are a half-life
    for name, p in state.ema.named_parameters():
        torch.testing.assert_close(p, expected[name], rtol=0, atol=1e-14)
    for name, value in state.ema.named_buffers():
        assert torch.equal(value, state.model["painter"].get_buffer(name))
    assert int(state.ema.num_batches_tracked) == 8


def test_a_pass_that_is_not_finite_is_thrown_away_and_the_step_skipped():
    state = two_players()
    play(state, batch_of(0))
    before = {name: value.clone() for name, value in state.model.named_parameters()}
    average = {name: value.clone() for name, value in state.ema.named_parameters()}
    said = [finite for _, finite in play(state, batch_of(1), spoil=("painter",))]
    assert said == [True, False]
    for name, p in state.model.named_parameters():
        assert torch.equal(p, before[name]) == name.startswith("painter")
    assert all(torch.equal(p, average[name]) for name, p in state.ema.named_parameters())
    assert all(p.grad is None for p in state.model.parameters())
    assert (state.skipped, state.skipped_in_a_row, state.metered_steps, state.samples_seen) == (1, 1, 1, 16)
    play(state, batch_of(2))
    assert (state.skipped, state.skipped_in_a_row) == (1, 0)


def test_several_passes_resume_bit_identical(tmp_path):
    def run(path, stop_at=None):
        state = two_players()
        with RunDirectory(path, {}) as folder:
            for batch in training_steps(Settings(total_images=64, checkpoint_every=3, log_every=2), state, folder):
                play(state, batch, spoil=("critic",) if batch.step == 4 else ())
                if batch.step == stop_at:
                    os.kill(os.getpid(), signal.SIGTERM)
        return state

    whole = run(tmp_path / "whole")
    with pytest.raises(Interrupted):
        run(tmp_path / "stopped", stop_at=4)
    assert same(run(tmp_path / "stopped"), whole)


def test_several_passes_are_not_for_shards():
    with pytest.raises(ValueError, match="parallel 'fsdp' is not for training in several passes: use 'ddp'"):
        TrainState(
            nn.Linear(2, 2), lambda parameters: torch.optim.SGD(parameters), Ranks(0, 2, torch.device("cpu")),
            ema_half_life=1, execution=Execution("fsdp"), several_passes=True,
        )  # fmt: skip


@pytest.mark.parametrize("fused", [True, False])
def test_weights_laid_out_channels_last_resume_bit_identical(tmp_path, fused):
    """A fused optimiser walks through memory in order, so its slots must have the weights' layout, not the file's."""

    def run(path, stop_at=None):
        model = nn.Conv2d(3, 4, 3, padding=1).to(memory_format=torch.channels_last)
        with torch.no_grad():
            for p in model.parameters():
                p.copy_(randomness.normal(1, "weights", [p.ndim], p.shape)[0])
        state = TrainState(model, torch.optim.Adam(model.parameters(), lr=0.1, fused=fused), ALONE, ema_half_life=16)
        with RunDirectory(path, {}) as folder:
            for batch in training_steps(Settings(total_images=64, checkpoint_every=3, log_every=8), state, folder):
                state.model(randomness.normal(0, "x", batch.counters, (3, 5, 5))).square().mean().backward()
                state.update(batch, {})
                if batch.step == stop_at:
                    os.kill(os.getpid(), signal.SIGTERM)
        return state

    whole = run(tmp_path / "whole")
    with pytest.raises(Interrupted):
        run(tmp_path / "stopped", stop_at=4)
    assert same(run(tmp_path / "stopped"), whole)


def test_what_is_done_every_so_many_samples_is_due_once_for_each_multiple_and_at_the_end():
    due = [seen for seen in range(6, 61, 6) if is_due(seen, every=16, batch_size=6, total_samples=60)]
    assert due == [18, 36, 48, 60]


def test_the_console_shows_the_loss_and_the_time_left(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Progress, "PLAIN_INTERVAL", 0.0)
    rows = run_loop(make_state(), tmp_path)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("training:")]
    assert re.fullmatch(r"training: 16/80 img, [\d,]+ img/s, loss \d\S*, 0 s left", lines[1]), lines
    assert re.fullmatch(r"training: 80/80 img, [\d,]+ img/s, loss \d\S*", lines[-1])
    assert lines[-1].endswith(f"loss {rows[-1]['loss']:.3g}")


def test_durations_are_rounded_to_what_one_wants_to_know():
    found = [duration(seconds) for seconds in (0.4, 40, 130, 5_900, 9_000, 200_000, 2_000_000)]
    assert found == ["0 s", "40 s", "2 min", "98 min", "2.5 h", "2 days", "23 days"]
