"""The zoo: collecting training runs, storing and reading them."""
