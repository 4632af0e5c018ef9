"""The one exception that users see as a line of text."""


class UserError(ValueError):
    """Something in the user's config, data or folders is wrong.

    The message is one line: the value found, what was expected, and the remedy. `main` prints it
    without a traceback and exits with code 2.
    """
