"""How every command begins, and how it ends where something is wrong; nothing heavy."""

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def make_parser(description: str, name: str | None = None) -> argparse.ArgumentParser:
    """A parser whose help shows `description` as it is written.

    Args:
        description: a module's docstring.
        name: of the command; None for that of the script.
    """
    return argparse.ArgumentParser(
        prog=name, description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )


@contextmanager
def one_line_errors(*errors: type[Exception], name: str | None = None) -> Iterator[None]:
    """Where the message says what to mend, and a traceback would hide it.

    Args:
        errors: that end the command so; none for `ImportError`, `OSError` and `ValueError`.
        name: of the command; None for that of the script.

    Raises:
        SystemExit: in place of them.
    """
    errors = errors or (ImportError, OSError, ValueError)
    try:
        yield
    except errors as error:
        raise SystemExit(f"{name or Path(sys.argv[0]).name}: error: {' '.join(str(error).split())}") from error
