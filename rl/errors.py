"""The error of this room."""


class RlError(ValueError):
    """A task, reward or check was asked for what it cannot do; the message says what was allowed."""
