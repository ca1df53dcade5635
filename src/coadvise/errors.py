"""Expected ends of a program. The command line prints each as one line and exits with its code."""


class UserError(ValueError):
    """A usage or configuration error. The message says what was given, what is allowed and what to do."""

    exit_code = 2


class CodeNotKeptError(UserError):
    """A network is a module that was given from Python, and this process does not have it."""


class StorageError(Exception):
    """The run directory cannot be written any more, or the shards no longer read: a full disk, no server, no rights.

    What was saved before is intact, and the run can continue from it.
    """

    exit_code = 74  # EX_IOERR


class LostProcessError(Exception):
    """Another process of the run no longer answers. The run can continue from its last checkpoint."""

    exit_code = 69  # EX_UNAVAILABLE


class Interrupted(Exception):  # noqa: N818  (not an error: the run is intact and can continue)
    """The run was asked to stop and has saved its state. The same command continues."""

    exit_code = 75  # EX_TEMPFAIL
