"""Errors that a user can cause. Command lines print their message as one line and exit with 2."""


class UserError(ValueError):
    """Something that the user asked for cannot be done; the message says what to change."""


class ConfigError(UserError):
    """A TopK setting is out of its domain or contradicts another."""


class DataError(UserError):
    """A text, tokenizer or dataset file is missing, unreadable or does not fit."""


class CheckpointError(UserError):
    """A checkpoint is incomplete, or was made with other settings than this run's."""


class TransportError(RuntimeError):
    """A pipeline rank is gone, or did not send what was due within the distributed timeout."""


class VerificationError(RuntimeError):
    """A sparse form did not give back the dense tensor bit for bit: a bug, never the user's."""
