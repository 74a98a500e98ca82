"""Diffusers' format, against diffusers itself: the same function, the stock pipeline, and back again."""

import json
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from triptych_common.randomness import SampleNoise
from triptych_common.samplers import ddim, final, guided
from triptych_dit import PRESETS, DiT, DiTConfig, from_diffusers, testing, to_diffusers
from triptych_dit.autoencoder.model import Autoencoder, load_autoencoder, scaled_sample
from triptych_dit.interop import diffusers_transformer, load_any, use_released_timesteps
from triptych_dit.interop.diffusers import padded_table, pipeline_label, renamed, translated, unpadded_table
from triptych_dit.weights import make_diffusion

diffusers = pytest.importorskip("diffusers")
diffusers.utils.logging.set_verbosity_error()
diffusers.utils.logging.disable_progress_bar()

SAME = DiTConfig(  # diffusers' own settings
    (8, 8), 3, patch_size=2, hidden_size=16, depth=2, num_heads=2, num_classes=10, timestep_frequency_shift=1,
    mlp_norm_eps=1e-5,
)  # fmt: skip
NULL = 1000  # DiTPipeline's
random_model = partial(testing.random_model, dtype=torch.float32)
tiny_vae = partial(testing.random_vae, latent_channels=3)


def opened(folder, dtype=torch.float64):
    """The transformer as diffusers reads it."""
    return diffusers.DiTTransformer2DModel.from_pretrained(
        Path(folder) / "transformer", torch_dtype=dtype, low_cpu_mem_usage=False
    )


def inputs(config=SAME, dtype=torch.float64):
    rng = torch.Generator().manual_seed(1)
    x = torch.randn(4, config.in_channels, *config.input_size, generator=rng, dtype=torch.float64)
    return x.to(dtype), torch.tensor([0, 100, 417, 999])


def outputs(model, transformer, labels, theirs):
    """Ours and diffusers' outputs for the same labels."""
    x, t = inputs(model.config, model.pos_embed.dtype)
    with torch.no_grad():
        return model(x, t, torch.tensor(labels)), transformer(x, t, torch.tensor(theirs)).sample


def assert_same_model(a, b):
    assert a.config == b.config
    ours, theirs = a.state_dict(), b.state_dict()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


@pytest.mark.parametrize("eps", [1e-5, 1e-6])
@pytest.mark.parametrize("shift", [1, 0])
def test_it_is_the_same_function(tmp_path, shift, eps):
    """Unpatched for shift 1; with the frequencies patched for shift 0. The epsilon travels in the config."""
    model = random_model(replace(SAME, timestep_frequency_shift=shift, mlp_norm_eps=eps, depth=4))
    to_diffusers(model, tmp_path / "out")
    transformer = opened(tmp_path / "out")
    ours, theirs = outputs(model.double(), transformer, [0, 9, 10, 3], [0, 9, NULL, 3])
    if shift == 0:
        assert float((ours - theirs).norm() / ours.norm()) > 1e-3  # else nothing is tested here
        use_released_timesteps(transformer)
        theirs = outputs(model, transformer, [0, 9, 10, 3], [0, 9, NULL, 3])[1]
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    single = outputs(model.float(), transformer.float(), [0, 9, 10, 3], [0, 9, NULL, 3])
    assert float((single[0] - single[1]).norm() / single[0].norm()) < 1e-6


def test_the_epsilon_counts():
    """What norm_eps carries is seen by the comparison above: the other value is another function."""
    model = random_model(replace(SAME, depth=4, mlp_norm_eps=1e-5)).double()
    transformer = diffusers_transformer(model)
    theirs = [outputs(model, transformer, [0] * 4, [0] * 4)[1]]
    for block in transformer.transformer_blocks:
        block.norm3.eps = 1e-6
    theirs.append(outputs(model, transformer, [0] * 4, [0] * 4)[1])
    assert float((theirs[0] - theirs[1]).abs().max()) > 1e-9


def test_the_gap_of_released_settings_is_what_is_documented():
    """Relative difference of an unpatched diffusers to 4-layer models with the released settings, weights N(0, 0.04)."""
    config = DiTConfig((16, 16), 4, patch_size=2, hidden_size=384, depth=4, num_heads=6)
    gaps = []
    for seed in range(3):
        model = random_model(config, seed=seed, std=0.04)
        transformer = diffusers_transformer(model)
        x, y = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(seed)), torch.tensor([3])
        for shift in (1, 0):
            use_released_timesteps(transformer, shift)
            for step in (0, 100, 999):
                with torch.no_grad():
                    ours, theirs = model(x, torch.tensor([step]), y), transformer(x, torch.tensor([step]), y).sample
                gaps.append(float((ours - theirs).norm() / ours.norm()))
    unpatched, patched = torch.tensor(gaps).view(3, 2, 3).mean(dim=0).tolist()
    print("\nrelative difference at t = 0, 100, 999: unpatched", *(f"{gap:.2g}" for gap in unpatched), end="; ")
    print("with released timesteps", *(f"{gap:.2g}" for gap in patched))
    assert unpatched[0] < 1e-6
    assert 0.02 < unpatched[1] < 0.06
    assert 0.18 < unpatched[2] < 0.4
    assert max(patched) < 1e-6


def test_xl_2_has_every_tensor_of_diffusers_both_ways():
    config = PRESETS["DiT-XL/2"]
    with torch.device("meta"):
        shapes, theirs = DiT(config).state_dict(), diffusers.DiTTransformer2DModel(out_channels=8)
    assert len(shapes) == 292
    ours = {name: torch.tensor(float(i)).expand(tensor.shape) for i, (name, tensor) in enumerate(shapes.items())}
    ours["y_embedder.embedding_table.weight"] = torch.arange(1001.0)[:, None].expand(-1, 1152)
    state = renamed(ours, 28)
    wanted = theirs.state_dict()
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == {
        n: tuple(t.shape) for n, t in wanted.items()
    }
    again, back = translated(
        {**theirs.config, "_class_name": type(theirs).__name__}, state, num_classes=None, shift=0, dropout=None
    )
    assert again == replace(config, mlp_norm_eps=1e-5)
    assert back.keys() == ours.keys()
    assert [name for name in ours if name != "pos_embed" and not torch.equal(back[name], ours[name])] == []


@pytest.mark.parametrize("change", [
    {}, {"num_classes": 1}, {"num_classes": 999}, {"num_classes": 1000}, {"num_classes": 1001}, {"num_classes": 1005},
    {"num_classes": 0}, {"class_dropout_prob": 0.0}, {"class_dropout_prob": 0.0, "num_classes": 1000},
    {"learn_sigma": False}, {"class_dropout_prob": 0.2, "input_size": (12, 12), "num_heads": 4, "in_channels": 1},
    {"timestep_frequency_shift": 0, "mlp_norm_eps": 1e-6, "patch_size": 4},
])  # fmt: skip
def test_any_size_and_class_count_goes_there_and_back(tmp_path, change):
    config = replace(SAME, **change)
    model = random_model(config)
    to_diffusers(model, tmp_path / "out")
    assert_same_model(from_diffusers(tmp_path / "out"), model)
    transformer = opened(tmp_path / "out")
    use_released_timesteps(transformer, config.timestep_frequency_shift)
    n = config.num_classes
    labels = [0, n // 2, max(n - 1, 0), config.null_label or 0]
    theirs = [pipeline_label(label, config) for label in labels[:3]] + [NULL if config.null_label else 0]
    ours, other = outputs(model.double(), transformer, labels, theirs)
    torch.testing.assert_close(ours, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("classes", [10, 1000, 1005, 0])
def test_without_the_side_file_classes_follow_from_the_label_table(tmp_path, classes):
    model = random_model(replace(SAME, num_classes=classes))
    to_diffusers(model, tmp_path / "out")
    (tmp_path / "out" / "triptych.json").unlink()
    assert_same_model(from_diffusers(tmp_path / "out"), model)
    assert_same_model(from_diffusers(tmp_path / "out" / "transformer"), model)
    assert from_diffusers(tmp_path / "out", timestep_frequency_shift=0).config.timestep_frequency_shift == 0
    with pytest.raises(ValueError, match=f"num_classes 12: the label table has .* fits {classes} with a null label"):
        from_diffusers(tmp_path / "out", num_classes=12)


def test_a_table_of_foreign_origin_is_read_as_diffusers_means_it(tmp_path):
    """num_embeds_ada_norm classes and a null row; with another number of classes, no null row."""
    torch.manual_seed(0)
    theirs = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, num_layers=2, in_channels=3, sample_size=8, num_embeds_ada_norm=6
    )
    theirs.save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"blocks differ in norm1\.emb\.timestep_embedder"
    ):  # each drew its own at first
        from_diffusers(tmp_path)
    theirs.transformer_blocks[1].norm1.emb.load_state_dict(theirs.transformer_blocks[0].norm1.emb.state_dict())
    theirs.save_pretrained(tmp_path)
    model = from_diffusers(tmp_path)
    assert (model.config.num_classes, model.config.null_label, model.config.mlp_norm_eps) == (6, 6, 1e-5)
    ours, other = outputs(model.double(), theirs.double().eval(), [0, 5, 6, 2], [0, 5, 6, 2])
    torch.testing.assert_close(ours, other, rtol=1e-12, atol=1e-12)
    config = from_diffusers(tmp_path, num_classes=7).config
    assert (config.num_classes, config.null_label) == (7, None)


def test_padding_keeps_the_null_row_last_and_at_1000():
    for classes in (1, 10, 999, 1000, 1001, 1004):
        config = replace(SAME, num_classes=classes)
        table = torch.randn(classes + 1, 16)
        padded = padded_table(config, table)
        assert torch.equal(padded[NULL], table[-1])
        assert torch.equal(padded[-1], table[-1])
        for label in {0, classes // 2, classes - 1, min(NULL, classes - 1)}:
            assert torch.equal(padded[pipeline_label(label, config)], table[label])
        assert torch.equal(unpadded_table(padded)[0], table)


def test_the_stock_pipeline_guides_ten_classes_to_our_own_images(tmp_path):
    """Same timesteps, same starting noise: what DiTPipeline makes is what our sampler makes."""
    model = random_model(SAME, std=0.1)
    to_diffusers(model, tmp_path / "out", vae=tiny_vae(scaling_factor=0.4), id2label={3: "three, tres", 9: "nine"})
    pipeline = diffusers.DiTPipeline.from_pretrained(tmp_path / "out", low_cpu_mem_usage=False)
    pipeline.set_progress_bar_config(disable=True)
    labels = pipeline.get_label_ids(["tres", "nine"])
    assert labels == [3, 9]
    images = pipeline(
        labels, guidance_scale=4.0, num_inference_steps=2, output_type="pt", generator=torch.Generator().manual_seed(5)
    )
    start = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(5))
    diffusion = make_diffusion(model.config, "noise")
    steps = sorted(pipeline.scheduler.timesteps.tolist())
    assert steps == [0, 500]
    visiting = replace(diffusion, schedule=diffusion.schedule.visiting(torch.tensor(steps)))

    class Noise(SampleNoise):
        def draw(self):
            return start

    denoise = guided(model, torch.tensor(labels), model.config.null_label, 4.0)
    with torch.no_grad():
        latents = final(ddim(denoise, visiting, Noise(0, [0, 1], (3, 8, 8), device=torch.device("cpu"))))
    decoded = Autoencoder(pipeline.vae, "given").decode(latents)
    torch.testing.assert_close(images.images, (decoded / 2 + 0.5).clamp(0, 1), rtol=0, atol=1e-4)
    unguided = pipeline(
        labels, guidance_scale=1.0, num_inference_steps=2, output_type="pt", generator=torch.Generator().manual_seed(5)
    )
    assert float((unguided.images - images.images).abs().max()) > 1e-3


@pytest.mark.parametrize(
    "scaling", [{"shift_factor": 0.3}, {"latents_mean": (0.5, -1.0, 0.1), "latents_std": (2.0, 1.0, 0.4)}]
)
def test_the_pipeline_decodes_normalised_latents_and_the_exported_encoder_gives_them(tmp_path, scaling):
    """It knows the scale factor alone; the rest moves into the autoencoder."""
    model, vae = random_model(SAME, std=0.1), tiny_vae(scaling_factor=0.4, **scaling)
    ours = Autoencoder(vae, "given")
    to_diffusers(model, tmp_path / "out", vae=ours, facts={"predict": "noise", "autoencoder": ours.facts()})
    pipeline = diffusers.DiTPipeline.from_pretrained(tmp_path / "out", low_cpu_mem_usage=False)
    latents, images = torch.randn(2, 3, 8, 8), torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        decoded = pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor).sample.clamp(-1, 1)
    torch.testing.assert_close(decoded, ours.decode(latents), rtol=0, atol=1e-5)
    exported, noise = load_autoencoder(str(tmp_path / "out")), torch.randn(2, 3, 8, 8)
    encoded = (scaled_sample(a.moments(images), noise, a.space) for a in (ours, exported))
    torch.testing.assert_close(*encoded, rtol=1e-4, atol=1e-4)
    assert load_any(tmp_path / "out").space == exported.space


@pytest.mark.parametrize("name", ["DDPMScheduler", "DPMSolverMultistepScheduler", "EulerDiscreteScheduler", "unipc"])
def test_other_schedulers_by_name_run_in_the_pipeline(tmp_path, name):
    to_diffusers(random_model(SAME), tmp_path / "out", vae=tiny_vae(), scheduler=name)
    pipeline = diffusers.DiTPipeline.from_pretrained(tmp_path / "out", low_cpu_mem_usage=False)
    pipeline.set_progress_bar_config(disable=True)
    assert type(pipeline.scheduler).__name__.lower().startswith(name.lower())
    config = pipeline.scheduler.config
    assert (config.beta_start, config.beta_end, config.beta_schedule) == (1e-4, 0.02, "linear")
    images = pipeline([3], num_inference_steps=2, output_type="pt").images
    assert images.shape == (1, 3, 16, 16)
    assert bool(images.isfinite().all())


def test_an_unconditional_model_gives_one_image_whatever_label_and_guidance(tmp_path):
    to_diffusers(random_model(replace(SAME, num_classes=0)), tmp_path / "out")
    pipeline = diffusers.DiTPipeline.from_pretrained(tmp_path / "out", vae=tiny_vae(), low_cpu_mem_usage=False)
    pipeline.set_progress_bar_config(disable=True)
    a, b = (
        pipeline(
            [label],
            guidance_scale=scale,
            num_inference_steps=2,
            output_type="pt",
            generator=torch.Generator().manual_seed(5),
        )
        for label, scale in ((0, 1.0), (777, 4.0))
    )
    torch.testing.assert_close(a.images, b.images, rtol=0, atol=1e-5)


def test_leading_timesteps_keep_ddim_closest_to_our_grid():
    """Of diffusers' three spacings: measured where the exact denoiser is known, eight narrow Gaussians in 16 dimensions."""
    diffusion = make_diffusion(DiTConfig(learn_sigma=False), "noise")
    means = torch.randn(8, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    start = torch.randn(64, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def noise_in(x, t):
        alpha_bar = diffusion.schedule.alpha_bar[int(t)]
        variance = alpha_bar * 0.01 + 1 - alpha_bar
        away = x[:, None] - alpha_bar.sqrt() * means
        weight = torch.softmax(-away.square().sum(-1) / (2 * variance), dim=1)
        return (1 - alpha_bar).sqrt() * (weight[..., None] * away).sum(1) / variance

    class Noise(SampleNoise):
        def draw(self):
            return start

    noise = Noise(0, range(64), (16,), device=torch.device("cpu"), dtype=torch.float64)
    ours = final(ddim(lambda x, t: noise_in(x, t[0]), diffusion.respaced(20), noise))
    gaps = {}
    for spacing in ("leading", "linspace", "trailing"):
        scheduler = diffusers.DDIMScheduler(clip_sample=False, timestep_spacing=spacing)
        scheduler.set_timesteps(20)
        x = start
        for t in scheduler.timesteps:
            x = scheduler.step(noise_in(x, t), t, x).prev_sample
        gaps[spacing] = float((x - ours).norm() / ours.norm())
    assert gaps["leading"] < 0.01
    assert gaps["leading"] < min(gaps["linspace"], gaps["trailing"]) / 2, gaps


WRONG_MODELS = [
    ({"block_design": "in_context"}, "block_design in_context: diffusers' DiT knows only adaln_zero"),
    ({"mlp_ratio": 2.0}, "mlp_ratio 2.0"),
    ({"input_size": (8, 16)}, "input_size 8x16: diffusers' DiT knows only squares"),
]


@pytest.mark.parametrize(("change", "message"), WRONG_MODELS)
def test_models_that_diffusers_has_no_module_for(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        to_diffusers(random_model(replace(SAME, **change)), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_parts_that_do_not_suit_the_model_are_refused(tmp_path):
    model, out = random_model(SAME), tmp_path / "out"
    moved = random_model(SAME)
    moved.pos_embed += 0.1
    other = diffusers.DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False)
    learned = diffusers.DDPMScheduler(variance_type="learned_range", clip_sample=False)
    latent = {"autoencoder": {"spec": "elsewhere", "sha256": "0" * 64, "scale_factor": 0.5}}
    scaled = {"autoencoder": {"spec": "elsewhere", "scale_factor": 0.5}}
    cases = [
        (moved, {}, "position embedding is not the sine-cosine one"),
        (model, {"vae": testing.random_vae(latent_channels=4)}, "the autoencoder has 4 latent channels, the model 3"),
        (model, {"vae": tiny_vae(shift_factor=0.1, use_quant_conv=False)}, "shift_factor, which DiTPipeline ignores"),
        (model, {"vae": tiny_vae(), "facts": scaled}, "elsewhere: scale_factor is 0.5, given has 0.18215"),
        (model, {"vae": Autoencoder(tiny_vae(scaling_factor=0.5), "mine"), "facts": latent}, "sha256 is 0{12}, mine has"),
        (model, {"vae": tiny_vae(), "facts": {"autoencoder": None}}, "trained on pixels"),
        (model, {"vae": str(tmp_path)}, "no config.json"),
        (model, {"scheduler": other}, "does not suit the model in beta_schedule scaled_linear"),
        (model, {"scheduler": diffusers.DDIMScheduler()}, r"clip_sample True \(expected False\)"),
        (model, {"scheduler": learned}, "the pipeline drops the learned variance"),
        (model, {"scheduler": diffusers.DDIMScheduler(clip_sample=False), "facts": {"predict": "sample"}}, "prediction_type"),
        (model, {"scheduler": "FlowMatchEulerDiscreteScheduler"}, "FlowMatchEulerDiscreteScheduler"),
        (model, {"id2label": {10: "ten"}}, r"id2label 10: 'ten': expected labels 0..9"),
        (model, {"id2label": {"x": "ten"}}, r"expected labels 0..9"),
    ]  # fmt: skip
    for wrong, options, message in cases:
        with pytest.raises((ValueError, FileNotFoundError), match=message) as refused:
            to_diffusers(wrong, out, **options)
        assert "\n" not in str(refused.value)
    assert not list(tmp_path.iterdir())


def test_an_export_is_whole_or_absent_and_repeating_it_replaces(tmp_path, monkeypatch):
    first, second, out = random_model(SAME), random_model(SAME, seed=1), tmp_path / "out"
    to_diffusers(first, out)
    with monkeypatch.context() as planted:

        def full_disk(*args, **kwargs):
            raise SafetensorError("I/O error: No space left on device (os error 28)")

        planted.setattr(diffusers.DiTTransformer2DModel, "save_pretrained", full_disk)
        with pytest.raises(OSError, match=r"cannot be written .*No space left on device"):
            to_diffusers(second, out)
    assert_same_model(from_diffusers(out), first)
    to_diffusers(second, out)
    assert_same_model(from_diffusers(out), second)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep me")
    with pytest.raises(ValueError, match=r"holds something else \(no triptych.json\)"):
        to_diffusers(first, tmp_path / "mine")
    assert (tmp_path / "mine" / "notes.txt").read_text() == "keep me"


@pytest.mark.parametrize("options", [
    {"max_shard_size": "20KB"}, {"safe_serialization": False}, {"safe_serialization": False, "max_shard_size": "20KB"},
    {"variant": "fp16"}, {"variant": "fp16", "max_shard_size": "20KB"},
])  # fmt: skip
def test_shards_and_old_bin_files_are_read(tmp_path, options):
    model = random_model(SAME)
    diffusers_transformer(model).save_pretrained(tmp_path / "transformer", **options)
    assert ("max_shard_size" in options) == bool(list((tmp_path / "transformer").glob("*.index*.json")))
    assert_same_model(from_diffusers(tmp_path), model)


def test_folders_of_something_else_are_refused_in_one_line(tmp_path):
    to_diffusers(random_model(SAME), tmp_path / "good")
    transformer = opened(tmp_path / "good", torch.float32)

    def spoiled(name, change=None, config=None):
        folder = tmp_path / name
        shutil.copytree(tmp_path / "good", folder)
        if change:
            transformer = opened(folder, torch.float32)
            change(transformer)
            transformer.save_pretrained(folder / "transformer")
        path = folder / "transformer" / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **(config or {})}))
        return folder

    def untie(transformer):
        transformer.transformer_blocks[1].norm1.emb.class_embedder.embedding_table.weight.data += 1

    def forget(transformer):
        del transformer.proj_out_1

    empty, weightless = tmp_path / "empty", spoiled("weightless")
    empty.mkdir()
    next((weightless / "transformer").glob("*.safetensors")).unlink()
    cases = [
        (spoiled("untied", untie), "blocks differ in norm1.emb.class_embedder"),
        (spoiled("forgotten", forget), "missing: proj_out_1.weight, proj_out_1.bias"),
        (spoiled("unet", config={"_class_name": "UNet2DConditionModel"}), "a UNet2DConditionModel with norm_type"),
        (spoiled("activation", config={"activation_fn": "geglu"}), "activation_fn geglu: a DiT has gelu-approximate"),
        (spoiled("outputs", config={"out_channels": 4}), "out_channels 4 for in_channels 3"),
        (spoiled("no depth", config={"num_layers": None}), "is not of a DiT"),
        (spoiled("shape", config={"num_layers": 3}), "missing: transformer_blocks.2"),
        (empty, "no config.json"), (weightless, "has no diffusion_pytorch_model.safetensors"),
    ]  # fmt: skip
    for folder, message in cases:
        with pytest.raises((ValueError, FileNotFoundError), match=message) as refused:
            from_diffusers(folder)
        assert str(folder) in str(refused.value)
        assert "\n" not in str(refused.value)
    assert transformer.config.num_layers == 2


def test_a_model_from_anywhere_carries_the_facts_of_its_origin(tmp_path):
    model = random_model(SAME)
    facts = {
        "predict": "sample",
        "autoencoder": {"spec": "elsewhere", "scale_factor": 0.5},
        "class_names": ["cat, tabby", "dog"],
        "kind": "DiT",
    }
    to_diffusers(model, tmp_path / "ours", vae=tiny_vae(scaling_factor=0.5), facts=facts)
    trained = load_any(tmp_path / "ours")
    assert trained.diffusion.predict == "sample"
    space = Autoencoder(tiny_vae(scaling_factor=0.5), str(tmp_path / "ours")).space
    assert trained.space == space  # it is in the folder now
    assert trained.class_names == ("cat, tabby", "dog")
    (tmp_path / "ours" / "triptych.json").unlink()
    trained = load_any(tmp_path / "ours")
    assert trained.space == replace(space, sha256=None, encoder_sha256=None)
    assert trained.diffusion.predict == "sample"  # the scheduler's config says so
    assert trained.class_names == ("cat, tabby", "dog", *map(str, range(2, 10)))  # model_index.json has two
    assert load_any(tmp_path / "ours" / "transformer").facts.keys() == {"predict", "source", "fetch_autoencoder"}
    scheduler = tmp_path / "ours" / "scheduler" / "scheduler_config.json"
    theirs = json.loads(scheduler.read_text())
    linear = torch.linspace(1e-4, 0.02, 1000).tolist()
    for change, message in (
        ({"beta_schedule": "squaredcos_cap_v2"}, "beta_schedule squaredcos_cap_v2"),
        ({"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr True"),
        ({"trained_betas": [0.01] * 1000}, "trained_betas are not the linear ones"),
        ({"trained_betas": linear[:-1]}, "trained_betas are not the linear ones"),
        ({"prediction_type": "v_prediction"}, "prediction_type v_prediction"),
        ({"prediction_type": "flow_prediction", "use_flow_sigmas": True}, "use_flow_sigmas True"),
    ):
        scheduler.write_text(json.dumps({**theirs, **change}))
        with pytest.raises(ValueError, match=f"its scheduler is of another process: .*{message}.*; pass --predict if"):
            load_any(tmp_path / "ours")
        assert load_any(tmp_path / "ours", predict="noise").diffusion.predict == "noise"
    scheduler.write_text(json.dumps({**theirs, "trained_betas": linear}))
    assert load_any(tmp_path / "ours").diffusion.predict == "sample"
    diffusers.FlowMatchEulerDiscreteScheduler().save_pretrained(tmp_path / "ours" / "scheduler")
    with pytest.raises(ValueError, match="FlowMatchEulerDiscreteScheduler has no betas"):
        load_any(tmp_path / "ours")


def test_missing_sources_are_one_line(tmp_path, monkeypatch):
    import huggingface_hub

    def unreachable(*args, **kwargs):
        raise OSError("we are offline")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", unreachable)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("{}")  # as a run's folder has it
    monkeypatch.chdir(tmp_path)
    cases = [
        ("run/typo", "run/typo: no such file or folder, and no published model"),
        ("runs/dit", "runs/dit: no such file or folder, and no published model; expected a model file"),
        ("DiT-B/2", "DiT-B/2: .*no published model; expected .* DiT-XL/2@256, DiT-XL/2@512"),
        ("absent.pt", "no such file"),
        ("someone/dit", r"not available from the Hugging Face hub \(we are offline\)"),
        ("run", "no finished model"),
    ]
    for spec, message in cases:
        with pytest.raises(OSError, match=message) as refused:
            load_any(spec)
        assert "\n" not in str(refused.value)


def test_a_hub_repository_is_read_as_its_folder(tmp_path, monkeypatch):
    """The released repositories hold weights trained with shift 0, whatever diffusers makes of them."""
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError

    model = random_model(replace(SAME, timestep_frequency_shift=0, mlp_norm_eps=1e-6))
    to_diffusers(model, tmp_path / "out", vae=tiny_vae())
    (tmp_path / "out" / "triptych.json").unlink()

    def from_folder(repo, name):
        assert repo in ("someone/dit", "facebook/DiT-XL-2-256")
        if not (tmp_path / "out" / name).exists():
            raise EntryNotFoundError(f"no {name}")
        return str(tmp_path / "out" / name)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", from_folder)
    trained = load_any("someone/dit")
    assert trained.model.config == replace(model.config, timestep_frequency_shift=1)
    assert trained.facts["autoencoder"]["spec"] == "someone/dit"
    assert_same_model(from_diffusers("facebook/DiT-XL-2-256"), model)


def test_foreign_folders_do_not_unpickle(tmp_path):
    to_diffusers(random_model(SAME), tmp_path / "out")
    weights = next((tmp_path / "out" / "transformer").glob("*.safetensors"))
    torch.save({"x": print}, weights.with_suffix(".bin"))
    weights.unlink()
    with pytest.raises(ValueError, match=r"builtins.print.*may run code"):
        from_diffusers(tmp_path / "out")
