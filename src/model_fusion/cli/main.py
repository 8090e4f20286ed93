"""The command `model-fusion`: one sub-command a verb. Nothing here imports torch or transformers."""

from __future__ import annotations

import sys
import traceback

import click
import typer

from model_fusion.cli.audit import audit
from model_fusion.cli.chat import chat
from model_fusion.cli.dynamic import app as dynamic
from model_fusion.cli.ensemble import ensemble
from model_fusion.cli.fuse import fuse
from model_fusion.cli.generate import generate
from model_fusion.cli.inspect import inspect
from model_fusion.cli.lora import app as lora
from model_fusion.cli.merge import merge
from model_fusion.cli.mix import app as mix
from model_fusion.cli.stack import stack
from model_fusion.cli.statistics import adamerge, statistics
from model_fusion.cli.verify import verify
from model_fusion.errors import ModelFusionError

app = typer.Typer(
    name="model-fusion",
    help="Make one model out of several.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.callback()
def root(debug: bool = typer.Option(False, "--debug", help="Show the traceback of an error.")) -> None:
    """Make one model out of several."""


app.command("merge")(merge)
app.command("audit")(audit)
app.command("fuse")(fuse)
app.command("generate")(generate)
app.command("chat")(chat)
app.command("ensemble")(ensemble)
app.command("stack")(stack)
app.command("verify")(verify)
app.command("inspect")(inspect)
app.command("statistics")(statistics)
app.command("adamerge")(adamerge)
app.add_typer(lora, name="lora")
app.add_typer(mix, name="mix")
app.add_typer(dynamic, name="dynamic")


def main() -> None:
    """Run the command line. What the user can mend is one line on standard error and exit code 2."""
    try:
        app(standalone_mode=False)
    except ModelFusionError as error:
        _fail(error)
    except OSError as error:
        _fail(error)
    except click.ClickException as error:
        error.show()
        sys.exit(2)
    except (KeyboardInterrupt, click.Abort):
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def _fail(error: Exception) -> None:
    if "--debug" in sys.argv:
        traceback.print_exception(error)
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    sys.exit(2)
