"""The command line: recipes, runs, evaluation, and the commands themselves."""

import sys

from guidance_nb._lazy import offer

__all__, __getattr__, __dir__ = offer(__name__, __file__)


def _main() -> None:
    "The command `guidance-nb`; what it cannot import, without an extra or without memory, is one line."
    try:
        from guidance_nb.cli._app import main
    except (ImportError, MemoryError, OSError) as error:
        message = " ".join(str(error).split()) or "out of memory while loading"
        print(f"guidance-nb: {message}", file=sys.stderr)
        sys.exit(2)
    main()
