"""The zoo: collecting training runs, storing and reading them."""

# What workers are forked with: the first optimiser of a process imports torch._dynamo, the first task all that tasks are made of.
PRELOAD = ("torch._dynamo", "triptych_gpt.zoo.cohorts", "triptych_gpt.tasks.registry")
