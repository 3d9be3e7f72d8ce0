"""The one exception that is meant to be read by the user."""


class HelpsteerError(Exception):
    """A mistake or a condition that the user can mend.

    The message names the file, row, key or value and says what to do. The command line prints it without a traceback
    and exits with 2. An asset turns it into a failure that is not retried. Characters that harm a terminal or database
    (escape sequences, half a surrogate pair, marks that turn the line round) are spelt out, such as \\x1b.
    """

    def __init__(self, message: str) -> None:
        super().__init__("".join(c if c.isprintable() or c in "\n\t" else f"{c!a}"[1:-1] for c in message))
