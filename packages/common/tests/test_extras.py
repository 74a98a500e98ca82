"""What is imported on demand: an absent package says how to get it, a broken one why it is broken."""

import pytest
from triptych_common.extras import import_extra


def test_an_absent_package_says_how_to_install_it():
    with pytest.raises(ImportError, match="pip install it"):
        import_extra("no_such_package.part", "pip install it")


@pytest.mark.parametrize("body", ["import no_such_dependency", "raise RuntimeError('first\\nno_such_dependency')"])
def test_a_broken_package_says_why(body, tmp_path, monkeypatch):
    (tmp_path / "broken_package.py").write_text(body)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ImportError, match=r"broken_package: installed, but cannot be imported \(.*no_such_dependency"):
        import_extra("broken_package", "pip install it")


def test_a_name_of_a_module_is_imported():
    assert import_extra("math", "", "pi") > 3
