"""The command `model-fusion`: one sub-command a verb. Nothing here imports torch or transformers."""

from __future__ import annotations

import sys
import traceback
from typing import Any

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
from model_fusion.cli.mergekit import MergekitCommand
from model_fusion.cli.mix import app as mix
from model_fusion.cli.safety import safety
from model_fusion.cli.search import search
from model_fusion.cli.stack import stack
from model_fusion.cli.statistics import adamerge, statistics
from model_fusion.cli.verify import verify
from model_fusion.errors import ModelFusionError

# newer versions of typer carry a click of their own, whose exceptions are not those of the package click
_WRONG_USE: Any = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")

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


app.command("merge", cls=MergekitCommand)(merge)
app.command("audit")(audit)
app.command("fuse")(fuse)
app.command("generate")(generate)
app.command("chat")(chat)
app.command("ensemble")(ensemble)
app.command("safety")(safety)
app.command("search")(search)
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
        code = app(standalone_mode=False)  # 130 where typer itself caught Ctrl-C
    except ModelFusionError as error:
        _fail(error)
    except OSError as error:
        _fail(error)
    except _WRONG_USE as error:
        error.show()
        sys.exit(2)
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    if code == 130:
        print("interrupted", file=sys.stderr)
    if code:
        sys.exit(code)


def _fail(error: Exception) -> None:
    if "--debug" in sys.argv:
        traceback.print_exception(error)
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    sys.exit(2)
