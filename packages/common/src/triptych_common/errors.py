"""Exceptions for runs that end early through no fault of the input."""


class Interrupted(Exception):
    """A signal stopped the run after everything was saved; `exit_code` is 128 plus the signal's number."""

    def __init__(self, message: str, signum: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signum


class Diverged(RuntimeError):
    """The loss became non-finite again after every permitted rollback."""
