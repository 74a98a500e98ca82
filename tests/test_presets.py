"""Presets of training: their identities are those that runs on disk were recorded with, on every machine."""

import hashlib
import importlib.util
import json

import pytest
import torch

PRESETS = {  # module, table of presets, digest of all their identities
    "dit": ("triptych_dit.train_config", "TRAIN_PRESETS", "bc05a3083aae"),
    "autoencoder": ("triptych_dit.autoencoder.config", "AUTOENCODER_PRESETS", "30a10f5c861a"),
    "gpt": ("triptych_gpt.train_config", "TRAIN_PRESETS", "0f44aa9a144e"),
    "gan": ("triptych_gangealing.stylegan2.train_config", "PRESETS", "7b2c92942cd2"),
    "align": ("triptych_gangealing.train_config", "PRESETS", "cf568d905d04"),
}


@pytest.mark.parametrize("gpu", [False, True])
@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_has_one_identity(name, gpu, monkeypatch):
    """A changed digest refuses to resume runs that were started before: give a new setting a preset of its own instead."""
    module, table, digest = PRESETS[name]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    spec = importlib.util.find_spec(module)
    copy = importlib.util.module_from_spec(spec)  # the module itself was imported before
    spec.loader.exec_module(copy)
    identities = {preset: config.identity() for preset, config in getattr(copy, table).items()}
    text = json.dumps(identities, sort_keys=True, default=str)
    assert hashlib.sha256(text.encode()).hexdigest()[:12] == digest
