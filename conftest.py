"""Every test runs with the packages' annotations checked: shapes by jaxtyping, types by beartype, where `float` admits int."""

from jaxtyping import install_import_hook

# Not by the option --jaxtyping-packages: it cuts a typechecker with arguments apart at its commas.
install_import_hook(
    ["triptych_common", "triptych_dit", "triptych_gpt", "triptych_gangealing", "triptych_thesis"],
    "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))",
)
