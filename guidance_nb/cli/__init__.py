"""The command line: recipes, runs, evaluation, and the commands themselves."""


def _main() -> None:
    "The command `guidance-nb`; without the extra it says, in one line, how to install it."
    try:
        from guidance_nb.cli.app import main
    except ImportError as error:
        raise SystemExit(f"guidance-nb: {error}") from None
    main()
