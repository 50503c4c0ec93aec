"""The command line's entry: `der-fast COMMAND`."""

from __future__ import annotations

import io
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated

import typer

from der_fast.cli.demo import demo
from der_fast.cli.doctor import doctor
from der_fast.cli.evaluate import evaluate
from der_fast.cli.export import export
from der_fast.cli.forget import forget
from der_fast.cli.group import Commands
from der_fast.cli.learn import learn
from der_fast.cli.predict import predict
from der_fast.cli.rename import rename
from der_fast.cli.report import report
from der_fast.cli.train import train

app = typer.Typer(
    cls=Commands,
    name="der-fast",
    help="Image classifiers that learn new classes in steps and hardly grow.",
    no_args_is_help=True,
    # Rich tracebacks show local variables, which may hold a whole data set.
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(demo)
app.command()(train)
app.command()(learn)
app.command()(rename)
app.command()(forget)
app.command("eval")(evaluate)
app.command()(predict)
app.command()(export)
app.command()(report)
app.command()(doctor)


def _show_version(wanted: bool) -> None:
    if wanted:
        try:
            typer.echo(version("der_fast"))
        except PackageNotFoundError:
            typer.echo("unknown: der_fast is not installed")
        raise typer.Exit


@app.callback()
def _options(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="print the version and exit")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Run the command line and end the process with its exit code."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A file's name need not be UTF-8; showing it must not end the command. The replacement is also a valid escape in JSON.
        sys.stdout.reconfigure(errors="backslashreplace")
    app()


if __name__ == "__main__":
    main()
