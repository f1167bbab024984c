"""Errors that a user can cause. Command lines print their message as one line and exit with 2."""


class UserError(ValueError):
    """Something that the user asked for cannot be done; the message says what to change."""


class ConfigError(UserError):
    """A TopK setting is out of its domain or contradicts another."""


class DataError(UserError):
    """A text, tokenizer or dataset file is missing, unreadable or does not fit."""


class CheckpointError(UserError):
    """A checkpoint is incomplete, or was made with other settings than this run's."""


class UnsafeCheckpointError(CheckpointError):
    """A checkpoint names code that no checkpoint needs; nothing of it was run."""


class RunError(UserError):
    """A run that was going well cannot go on: a loss that is no number, a disk that is full.

    One rank meets it and the others wait for that rank, so that it speaks at once.
    """


class TransportError(RuntimeError):
    """A pipeline rank is gone, or did not send what was due within the distributed timeout."""


class VerificationError(RuntimeError):
    """A sparse form did not give back the dense tensor bit for bit: a bug, never the user's."""


class AnalysisError(UserError):
    """A measurement that was asked for cannot be made of this model, corpus or study."""
