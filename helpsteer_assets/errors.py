"""The one exception that is meant to be read by the user."""


class HelpsteerError(Exception):
    """A mistake or a condition that the user can mend.

    The message names the file, row, key or value and says what to do. The command line prints it without a
    traceback and exits with 2; an asset turns it into a failure that is not retried. What no terminal and no database
    should get of a name or a value (escape sequences, half a surrogate pair, marks that turn the line round) is spelt
    out in it, such as \\x1b.
    """

    def __init__(self, message: str) -> None:
        super().__init__("".join(c if c.isprintable() or c in "\n\t" else f"{c!a}"[1:-1] for c in message))
