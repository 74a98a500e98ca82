"""The zoo: collecting training runs, storing and reading them."""

PRELOAD = (
    "torch._dynamo",
    "triptych_gpt.zoo.cohorts",
)  # what workers are forked with; the first optimiser imports the former
