"""What can go wrong that is not our fault; the command line prints each as one line, and has an exit code for each."""


class UserError(ValueError):
    """The user's to mend: says what was given, what is allowed and what to do. Exit code 2."""


class StorageError(Exception):
    """The run directory can no longer be written: a full or read-only disk, a folder that is gone. Exit code 74.

    What was saved before is whole, and the run goes on from it.
    """


class LostProcessError(Exception):
    """Another process of a run on several no longer answers. Exit code 69; the run goes on from its last checkpoint."""
