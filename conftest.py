"""Every test runs with the packages' annotations checked: shapes by jaxtyping, types by beartype, where `float` admits int."""

import os

from hypothesis import HealthCheck, settings
from jaxtyping import install_import_hook

# Not by the option --jaxtyping-packages: it cuts a typechecker with arguments apart at its commas.
install_import_hook(
    ["triptych_common", "triptych_dit", "triptych_gpt", "triptych_gangealing", "triptych_thesis"],
    "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))",
)

# The same examples in every run, so that a run of all tests fails only for what has changed; `make fuzz` draws new and more ones.
_LENIENT = {"deadline": None, "suppress_health_check": list(HealthCheck)}  # files are written and read in each example
settings.register_profile("default", derandomize=True, max_examples=50, database=None, **_LENIENT)
settings.register_profile("fuzz", max_examples=1000, **_LENIENT)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))
