"""The one exception that is meant to be read by the user."""


class HelpsteerError(Exception):
    """A mistake or a condition that the user can mend.

    The message names the file, row, key or value and says what to do. The command line prints it without a
    traceback and exits with 2; an asset turns it into a failure that is not retried.
    """
