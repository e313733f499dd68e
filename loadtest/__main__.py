"""`python -m loadtest`: what `turnout loadtest` is, where only this folder is at hand."""

import sys

from rich.console import Console

from loadtest.cli import app


def main() -> None:
    """Run the command line; what the operator did wrong is one line on stderr and exit code 1."""
    try:
        app(prog_name="loadtest")
    except (ValueError, OSError) as error:
        Console(stderr=True).print(f"loadtest: {error}", style="red", markup=False, soft_wrap=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
