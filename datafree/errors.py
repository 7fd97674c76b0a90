"""Mistakes that a person can mend: one sentence each, and a non-zero exit."""

import sys


class InputError(Exception):
    """Something given to the program is wrong; the message names the culprit and the remedy."""

    exit_code = 1


class OptionError(InputError):
    """An option is unknown or has a value that it cannot have."""

    exit_code = 2


def usage(text, at_least):
    """Print ``text`` and exit if it is asked for (code 0), or if fewer than ``at_least`` words are given (code 2)."""
    asked = bool({"-h", "--help"} & set(sys.argv))
    if asked or len(sys.argv) <= at_least:
        print(text.strip())
        sys.exit(0 if asked else 2)


def exit_on_input_error(main):
    """Run ``main()``; turn an :class:`InputError` into one line on stderr and its exit code."""
    try:
        main()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("interrupted; --resume auto goes on from the last checkpoint", file=sys.stderr)
        sys.exit(130)
