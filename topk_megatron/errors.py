"""Errors that a user can cause, and the codes with which a process ends.

Command lines print the message of such an error as one line and exit with `USER_ERROR`.
"""

# A user's mistake, or a run that cannot continue: the same command would end the same way again.
USER_ERROR = 2
# The run was asked to stop (SIGTERM) and saved; started again, it continues. It is the temporary
# failure of sysexits.h, and the code to put into Slurm's RequeueExit.
REQUEUE = 75


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
