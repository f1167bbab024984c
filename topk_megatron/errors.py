"""The project's errors, and the exit codes of its commands.

A command prints the message of a `UserError` as one line and exits with `USER_ERROR`.
"""

from pathlib import Path

# A user's mistake, or a run that cannot continue: the same command would fail again.
USER_ERROR = 2
# The run was asked to stop (SIGTERM) and saved; started again, it continues. This is EX_TEMPFAIL of
# sysexits.h, and the code to put into Slurm's RequeueExit.
REQUEUE = 75


class UserError(ValueError):
    """A request cannot be carried out; the message says what to change."""


class ConfigError(UserError):
    """A setting is out of range or contradicts another."""


class DataError(UserError):
    """A text, tokenizer or dataset file is missing, unreadable or unsuitable."""


class CheckpointError(UserError):
    """A checkpoint is incomplete, or its settings differ from this run's."""


class DamagedCheckpointError(CheckpointError):
    """A checkpoint that looks complete lacks something, or cannot be read.

    Attributes:
        damage: what is wrong with it, without the path.
    """

    def __init__(self, directory: Path, damage: str) -> None:
        super().__init__(
            f"{directory} is damaged: {damage}; copy it again, or choose another iteration"
        )
        self.damage = damage


class UnsafeCheckpointError(CheckpointError):
    """A checkpoint names code that no checkpoint needs; none of that code was run."""


class RunError(UserError):
    """A healthy run cannot continue: the loss is not finite, or the disk is full.

    One rank meets the error while the others wait for it, so it reports at once.
    """


class TransportError(RuntimeError):
    """A pipeline rank is lost, or did not send a message within the distributed timeout."""


class VerificationError(RuntimeError):
    """A sparse form did not reproduce the dense tensor bit for bit: a bug, not a user's mistake."""


class AnalysisError(UserError):
    """The requested measurement is impossible for this model, corpus or study."""
