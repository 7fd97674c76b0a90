"""Arguments of the programs that read runs: folders and a few flags. No torch is imported."""

import sys
from collections.abc import Sequence

from datafree import __version__
from datafree.errors import OptionError, short


def usage(text: str, at_least: int) -> None:
    """Print ``text`` and exit if --help is given (code 0), or fewer than ``at_least`` arguments are (code 2); for
    --version print that."""
    if "--version" in sys.argv:
        print(__version__)
        sys.exit(0)
    wants_help = bool({"-h", "--help"} & set(sys.argv))
    if wants_help or len(sys.argv) <= at_least:
        print(text.strip())
        sys.exit(0 if wants_help else 2)


def read_arguments(
    arguments: Sequence[str], of_one: tuple[str, ...], of_several: tuple[str, ...] = ()
) -> dict[str, list[str]]:
    """Flag -> its values; "": the folders. of_one, of_several: the flags by their number of values.

    Raises OptionError.
    """
    words = list(arguments)
    found: dict[str, list[str]] = {"": []}
    taking = found[""]
    while words:
        word, equals, value = words.pop(0).partition("=")
        if not word.startswith("--"):
            taking.append(word + equals + value)
        elif word not in of_one + of_several:
            raise OptionError(f"unknown option {short(word)}; the options are {', '.join(of_one + of_several)}")
        elif word in of_several:
            taking = found.setdefault(word, [])
            taking += [value] * bool(equals)
        else:
            taking = found[""]  # of a flag with one value, what follows are folders
            given = [value] if equals else words[:1]
            if not given or given[0].startswith("--") or not given[0]:
                raise OptionError(f"{word} needs a value")
            if word in found:
                raise OptionError(f"{word} is given twice; remove one of them")
            del words[: not equals]
            found[word] = given
    for flag, values in found.items():
        if not values:
            raise OptionError(f"{flag} needs a value" if flag else "give folders of runs; --help shows how")
    return found
