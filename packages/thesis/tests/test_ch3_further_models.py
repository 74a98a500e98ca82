"""What was measured of a further model is read back, and a damaged file is named."""

import json
from dataclasses import replace

import pytest
from triptych_common.storage.files import write_json
from triptych_gpt.settings import SamplerSettings
from triptych_gpt.train_config import TRAIN_PRESETS
from triptych_thesis.chapter3.experiments.scaling import FurtherModel
from triptych_thesis.chapter3.sizes import Amounts


def test_a_damaged_measurement_is_one_line_that_says_which_file_to_delete(tmp_path):
    model = FurtherModel(replace(TRAIN_PRESETS["smoke"], out=tmp_path), SamplerSettings(), Amounts())
    estimate = {"value": 0.5, "low": 0.25, "high": None}
    row = {"parameters": 3, "training_runs": 5, "pairs": 640}
    row |= dict.fromkeys(("unseen", "unseen_at_best", "train", "train_at_best"), estimate)
    assert not model.done
    write_json(model.path, {"row": row, "asked": model.identity})
    assert model.done
    assert model.row() == row
    whole = model.path.read_text()
    for spoiled in (
        whole[:-40],
        whole.replace('"unseen"', '"unseeN"'),
        whole.replace("640", '"640"'),
        json.dumps([row]),
    ):
        model.path.write_text(spoiled)
        with pytest.raises(ValueError, match=r"alignment\.json: .*; delete this file and repeat the command") as error:
            model.row()
        assert "\n" not in str(error.value)
