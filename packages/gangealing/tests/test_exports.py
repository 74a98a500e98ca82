"""What `import triptych_gangealing` gives."""

from importlib.util import find_spec

import pytest
import triptych_gangealing


def test_the_package_exports_what_it_is_named_after() -> None:
    wanted = {"Warp", "SpatialTransformer", "load_aligner", "align", "correspond", "pck", "load_generator"}
    assert wanted <= set(triptych_gangealing.__all__)


@pytest.mark.parametrize("name", triptych_gangealing.__all__)
def test_an_export_is_documented_and_no_module_bears_its_name(name: str) -> None:
    assert find_spec(f"triptych_gangealing.{name}") is None
    value = getattr(triptych_gangealing, name)
    assert value.__doc__
    assert getattr(triptych_gangealing, name) is value
