"""The `labelloop` command."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import Annotated, NoReturn

import msgspec
import typer
from rich.console import Console
from rich.markup import escape

from cli.deployment import DEMO, LAPTOP, Deployment, addresses_to_show
from labelloop.errors import LabelloopError, exit_code
from labelloop.model_config import ModelConfigs

app = typer.Typer(
    name="labelloop",
    help="Self-improving image labelling: annotate in Label Studio, and the model that pre-labels retrains by itself.",
    epilog="Exit codes: 0 done, 2 something you can mend (the message says how), 3 a service failed, 130 interrupted.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
console = Console()
problems = Console(stderr=True)

Model = Annotated[str, typer.Argument(help="Name of a folder under model_configs/.", show_default=False)]
Stage = Annotated[str, typer.Option(help="The deployed stage: `local` is this laptop's stack.", envvar="LABELLOOP_STAGE")]
Home = Annotated[Path | None, typer.Option(help="Folder of the laptop's stack, if not the usual one.", show_default=False)]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")]


@app.command()
def demo(
    annotations: Annotated[str, typer.Option(help="Numbers of annotations at which to train, rising.")] = "100,500,1000",
    exit_: Annotated[bool, typer.Option("--exit", help="Stop everything and leave at the end.")] = False,
    report: Annotated[Path | None, typer.Option(help="Write what was measured to this JSON file.", show_default=False)] = None,
    home: Annotated[Path, typer.Option(help="Folder for the demo's stack; it is emptied first.")] = DEMO,
) -> None:
    """Turn the whole loop on this machine: deploy, upload, annotate, train, promote, serve.

    Starts an AWS emulator, Label Studio and MLflow, deploys the real stacks, uploads scikit-learn's scanned digits and
    lets an annotator work until the model has been trained three times. Then everything goes on running until Ctrl-C.
    """
    from cli.demo import Demo

    try:
        counts = [int(count) for count in annotations.split(",")]
    except ValueError:
        raise typer.BadParameter("numbers with commas between them, such as 100,500,1000", param_hint="--annotations") from None
    if counts != sorted(set(counts)) or counts[0] < 1:
        raise typer.BadParameter("the numbers must rise and start above 0", param_hint="--annotations")
    if report and not report.resolve().parent.is_dir():
        raise typer.BadParameter(f"there is no folder {report.resolve().parent}", param_hint="--report")
    Demo(home.resolve(), counts, console).run(linger=None if exit_ else _until_interrupted, report=report)


@app.command()
def up(home: Annotated[Path, typer.Option(help="Folder that keeps the stack's data.")] = LAPTOP) -> None:
    """Start the laptop's stack, or bring the running one up to date with the code. Its data is kept."""
    from local.stack import LaptopStack

    configs = ModelConfigs.find()
    stack = LaptopStack(home.resolve(), model_configs=Path(str(configs[configs.names[0]].folder)).parent, report=_say)
    addresses = stack.up()
    console.print()
    for line in addresses_to_show(addresses):
        console.print(line, highlight=False, soft_wrap=True)
    console.print(
        "next: labelloop setup-label-studio-project MODEL, then labelloop upload-images MODEL FOLDER",
        highlight=False,
        soft_wrap=True,
    )


@app.command()
def down(
    home: Annotated[Path, typer.Option(help="Folder of the stack.")] = LAPTOP,
    erase: Annotated[bool, typer.Option("--erase", help="Delete the stack's data too.")] = False,
) -> None:
    """Stop the laptop's stack; `labelloop up` starts it again with its data."""
    from local.stack import LaptopStack

    stack = LaptopStack(home.resolve(), model_configs=Path("model_configs"), report=_say)
    if not stack.pids():
        _say("laptop", f"nothing runs in {home}")
    if erase:
        stack.erase()
    else:
        stack.down()


@app.command()
def status(model: Model, stage: Stage = "local", home: Home = None, as_json: AsJson = False) -> None:
    """Show versions, champion, annotations, when the next training is due and why, the running job, failures."""
    from cli.status import read_status, show

    found = read_status(Deployment.find(stage, home), ModelConfigs.find()[model])
    if as_json:
        print(msgspec.json.format(msgspec.json.encode(found)).decode())
    else:
        show(found, console)


@app.command()
def setup_label_studio_project(model: Model, stage: Stage = "local", home: Home = None, as_json: AsJson = False) -> None:
    """Create or update a model's Label Studio project from its config: storage, webhook and ML backend included.

    Running it twice changes nothing the second time.
    """
    from cli.label_studio_project import set_up_project

    done = set_up_project(Deployment.find(stage, home), ModelConfigs.find()[model])
    if as_json:
        print(msgspec.json.encode({"project": done.project, "changes": done.changes}).decode())
        return
    for change in done.changes or ["nothing to change"]:
        console.print(change, highlight=False, soft_wrap=True)
    console.print(f"project {done.project} is set up", highlight=False, soft_wrap=True)


@app.command()
def upload_images(
    model: Model,
    paths: Annotated[list[Path], typer.Argument(help="Image files and folders of them.", exists=True, show_default=False)],
    stage: Stage = "local",
    home: Home = None,
    as_json: AsJson = False,
) -> None:
    """Upload images for a model; each becomes a task. What is no image is listed and left out."""
    from cli.progress import Steps
    from cli.upload import image_files, upload

    deployment, config = Deployment.find(stage, home), ModelConfigs.find()[model].config
    deployment.ledger.project(model)  # without a project the images could become no tasks
    files, refused = image_files(paths)
    total = len(files) + len(refused)
    with Steps(problems if as_json else console, "uploading", len(files)) as steps:

        def done(name: str, refusal: str | None) -> None:
            steps.advance()
            if refusal:
                refused[name] = refusal

        upload(deployment.images, config.images_prefix, [(name, file.read_bytes) for name, file in files.items()], done)
    if as_json:
        print(msgspec.json.encode({"uploaded": total - len(refused), "refused": refused}).decode())
    else:
        console.print(f"uploaded {total - len(refused):,} of {total:,}", highlight=False, soft_wrap=True)
        for name, reason in refused.items():
            console.print(f"[yellow]refused[/yellow] {escape(name)}: {escape(reason)}", highlight=False, soft_wrap=True)
    if refused:
        raise typer.Exit(2)


def main() -> NoReturn:
    """Run the command; every error of labelloop's own becomes a message and an exit code."""
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        app()
    except LabelloopError as error:
        problems.print(f"[red]error:[/red] {escape(str(error))}", highlight=False, soft_wrap=True)
        sys.exit(exit_code(error))
    except KeyboardInterrupt:
        problems.print("interrupted", highlight=False, soft_wrap=True)
        sys.exit(130)
    sys.exit(0)


def _interrupt(number: int, frame: object) -> NoReturn:  # noqa: ARG001
    raise KeyboardInterrupt


def _until_interrupted() -> None:
    try:
        while True:
            signal.pause()
    except KeyboardInterrupt:
        console.print()


def _say(part: str, message: str) -> None:
    console.print(f"[cyan]{escape(part):<13}[/cyan] {escape(message)}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
