"""docs/cli.md, from the command line's own help: `make docs`."""

from __future__ import annotations

from pathlib import Path

import typer
from typer.cli import get_docs_for_click
from typer.main import get_command

from cli.main import app

FILE = Path(__file__).resolve().parents[1] / "docs" / "cli.md"
_INTRODUCTION = """\
Written by `make docs` from what `labelloop --help` says; a test compares. In a checkout each command is `uv run labelloop …`.

Completion: `labelloop --install-completion` writes it for the shell that runs (bash, zsh, fish, PowerShell);
`labelloop --show-completion` prints it instead.

| exit code | meaning |
|---|---|
| 0 | done; of `retrain --wait`: the gate has decided, whatever it decided, or nothing was new |
| 2 | something you can mend, and the message says how: a wrong option, config or secret, a stage that is not deployed |
| 2 | what was asked about is not so: `check` or `setup-label-studio-project --check` found something, `lineage --rebuild` has \
another digest, `upload-images` refused a file, `erase` found none of the images, or nobody said yes to it |
| 3 | a service failed (AWS, Label Studio, MLflow, a part of the laptop's stack), a training did, or a wait was over |
| 130 | interrupted; the command may be run again |

`--json` prints facts as JSON on standard output, and only those: progress, warnings and errors go to standard error.
"""


def reference() -> str:
    """The page as it should be."""
    command = get_command(app)
    context = typer.Context(command, info_name="labelloop")
    commands = get_docs_for_click(obj=command, ctx=context, name="labelloop", title="Commands")
    title, _, rest = commands.partition("\n")
    return f"{title}\n\n{_INTRODUCTION}\n{rest.strip()}\n"


if __name__ == "__main__":
    FILE.write_text(reference(), encoding="utf-8")
