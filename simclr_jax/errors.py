"""The one exception that users see as a line of text, and the commands that show it so."""

import sys


class UserError(ValueError):
    """Something in the user's config, data or folders is wrong.

    The message is one line: the value found, what was expected, and the remedy. `main` prints it
    without a traceback and exits with code 2.
    """


def run(main) -> None:
    """The entry point of a command line without a config: user errors are one line and exit code 2."""
    try:
        main(sys.argv[1:])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
