"""What ends a program without being its fault; the command line prints each as one line, and leaves with its code."""


class UserError(ValueError):
    """The user's to mend: says what was given, what is allowed and what to do."""

    exit_code = 2


class StorageError(Exception):
    """The run directory can no longer be written: a full or read-only disk, a folder that is gone.

    What was saved before is whole, and the run goes on from it.
    """

    exit_code = 74  # EX_IOERR


class LostProcessError(Exception):
    """Another process of a run on several no longer answers. The run goes on from its last checkpoint."""

    exit_code = 69  # EX_UNAVAILABLE


class Interrupted(Exception):  # noqa: N818  (not an error: the run is whole and goes on later)
    """The run was asked to stop, and has saved. The same command goes on."""

    exit_code = 75  # EX_TEMPFAIL
