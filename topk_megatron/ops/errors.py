"""The operator's own error, so that callers can tell a wrong argument from a failed kernel."""


class TopKArgumentError(ValueError):
    """An argument of a top-k operator is out of its domain; the message says what is allowed."""
