"""Ways for a run to end early that are not bad input."""


class Interrupted(Exception):
    """A signal asked for a stop; everything is saved."""

    def __init__(self, message: str, signum: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signum


class Diverged(RuntimeError):
    """The loss stayed non-finite through every rollback."""
