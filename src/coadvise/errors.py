"""The one error that is the user's to mend."""


class UserError(ValueError):
    """Says what was given, what is allowed and what to do. The command line prints it and exits with code 2."""
