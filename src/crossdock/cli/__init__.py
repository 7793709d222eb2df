"""The command line: one program, a file for each subcommand.

Importing this needs nothing but Python; what the commands need (the extra `cli`) is imported when
`main()` runs, and a missing package is an error that says how to get it.
"""

from __future__ import annotations

import importlib.util

from crossdock.errors import MissingDependencyError

__all__ = ["main"]


def main() -> None:
    """Run the subcommand that the command line asks for.

    Raises:
        MissingDependencyError: typer, rich or matplotlib is not installed.
    """
    for package in ("typer", "rich", "matplotlib"):
        if importlib.util.find_spec(package) is None:
            raise MissingDependencyError(package, extra="cli")
    import typer

    from crossdock.cli.bench import bench
    from crossdock.cli.demo import demo
    from crossdock.cli.tune import tune

    app = typer.Typer(help="Expert-parallel dispatch and combine.", no_args_is_help=True)
    app.command()(demo)
    app.command()(bench)
    app.command()(tune)
    app()
