"""The exit codes of a training process, beside 0 and Python's own.

2   a user's mistake, or a run that cannot go on (`topk_megatron.errors`); starting the same
    command again would end the same way
75  the run was asked to stop (SIGTERM), saved, and would go on if it were started again: the
    temporary failure of sysexits.h, and the code to put into Slurm's RequeueExit
"""

USER_ERROR = 2
REQUEUE = 75
