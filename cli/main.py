"""The `labelloop` command."""

from __future__ import annotations

import os
import signal
import sys
import webbrowser
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import msgspec
import typer
from rich.console import Console, ConsoleDimensions
from rich.markup import escape

from cli.deployment import DEMO, LAPTOP, Deployment, addresses_to_show, home_option
from cli.examples import ExampleModel
from labelloop.errors import ConfigError, LabelloopError, exit_code
from labelloop.model_config import ModelConfigs

if TYPE_CHECKING:
    from cli.takeover import Outcome

_EXIT_CODES = "Exit codes: 0 done, 2 something you can mend (the message says how), 3 a service failed, 130 interrupted."
app = typer.Typer(
    name="labelloop",
    help="Self-improving image labelling: annotate in Label Studio, and the model that pre-labels retrains by itself.",
    epilog=_EXIT_CODES,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
_WIDE = 130  # columns


class _Output(Console):
    """Wide where it is no window: in pipes, files and CI. The variable COLUMNS overrules it."""

    @property
    def size(self) -> ConsoleDimensions:
        found = super().size
        if self.file.isatty():
            return found
        asked = os.environ.get("COLUMNS", "")  # which Rich would not look at where TERM is dumb, as in CI
        return found._replace(width=int(asked) if asked.isdecimal() else _WIDE)

    @size.setter
    def size(self, new: tuple[int, int]) -> None:
        raise NotImplementedError("it is found out anew each time")


console = _Output()
problems = Console(stderr=True)

Model = Annotated[str, typer.Argument(help="Name of a folder under model_configs/.", show_default=False)]
Stage = Annotated[str, typer.Option(help="The deployed stage: `local` is this laptop's stack.", envvar="LABELLOOP_STAGE")]
Home = Annotated[
    Path | None,
    typer.Option(help="Folder of the laptop's stack, if not the usual one.", envvar="LABELLOOP_HOME", show_default=False),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")]


def _command(example: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Add a command; its help ends with the example and what its exit codes mean."""
    return app.command(epilog=f"Example: labelloop {example}\n\n{_EXIT_CODES}")


@_command("demo --annotations 100,500 --exit --report report.json")
def demo(
    model: Annotated[ExampleModel, typer.Option(help="The model whose example data set is annotated.")] = "digits",
    annotations: Annotated[
        str | None, typer.Option(help="Numbers of annotations at which to train, rising.", show_default="the config's")
    ] = None,
    exit_: Annotated[bool, typer.Option("--exit", help="Stop everything and leave at the end.")] = False,
    report: Annotated[Path | None, typer.Option(help="Write what was measured to this JSON file.", show_default=False)] = None,
    home: Annotated[Path, typer.Option(help="Folder for the demo's stack; it is emptied first.")] = DEMO,
) -> None:
    """Turn the whole loop on this machine: deploy, upload, annotate, train, promote, serve.

    Starts an AWS emulator, Label Studio and MLflow, deploys the real stacks, uploads scikit-learn's scanned digits (digits: one
    an image; digit_detector: several on photographs) and lets an annotator work until the model has been trained as often as
    its config says. Then everything goes on running until Ctrl-C.
    """
    from cli.demo import Demo

    if report and not report.resolve().parent.is_dir():
        raise typer.BadParameter(f"there is no folder {report.resolve().parent}", param_hint="--report")
    if annotations is None:
        annotations = ",".join(str(count) for count in ModelConfigs.find()[model].config.retrain.at)
    try:
        counts = [int(count) for count in annotations.split(",")]
    except ValueError:
        raise typer.BadParameter("numbers with commas between them, such as 100,500,1000", param_hint="--annotations") from None
    if counts != sorted(set(counts)) or counts[0] < 1:
        raise typer.BadParameter("the numbers must rise and start above 0", param_hint="--annotations")
    Demo(home.resolve(), model, counts, console).run(linger=None if exit_ else _until_interrupted, report=report)


@_command("up")
def up(
    home: Annotated[
        Path, typer.Option(help="Folder that keeps the stack's data, and nothing else.", envvar="LABELLOOP_HOME")
    ] = LAPTOP,
    as_json: AsJson = False,
) -> None:
    """Start the laptop's stack, or bring the running one up to date with the code. Its data is kept."""
    from local.stack import LaptopStack

    configs = ModelConfigs.find()
    if not configs.names:
        raise ConfigError(str(configs.root), "holds no model; make one with: labelloop create-new-model")
    say = partial(_say, to=problems) if as_json else _say
    stack = LaptopStack(home.resolve(), model_configs=Path(str(configs[configs.names[0]].folder)).parent, report=say)
    addresses = stack.up()
    if as_json:
        shown = {
            "label_studio": addresses.label_studio,
            "user": addresses.label_studio_user,
            "password": addresses.label_studio_password,
            "mlflow": addresses.mlflow,
        }
        print(msgspec.json.encode(shown).decode())
        return
    console.print()
    for line in addresses_to_show(addresses):
        console.print(line, highlight=False, soft_wrap=True)
    steps = ("setup-label-studio-project MODEL", "upload-images MODEL FOLDER")
    _say_next([f"labelloop {step}{home_option(home)}" for step in steps])


@_command("down --erase")
def down(
    home: Annotated[Path, typer.Option(help="Folder of the stack.", envvar="LABELLOOP_HOME")] = LAPTOP,
    erase: Annotated[bool, typer.Option("--erase", help="Delete the stack's data too.")] = False,
) -> None:
    """Stop the laptop's stack; `labelloop up` starts it again with its data."""
    from local.stack import LaptopStack

    stack = LaptopStack(home.resolve(), model_configs=Path("model_configs"), report=_say)
    if erase:
        stack.erase()
        return
    if not stack.pids():
        _say("laptop", f"nothing runs in {home}")
    stack.down()


@_command('create-new-model --model pets --problem-type classification --classes "Cat,Dog"')
def create_new_model(
    model: Annotated[str, typer.Option(help="Name of the model and its folder: lower-case letters, digits, _.")],
    problem_type: Annotated[str, typer.Option(help="classification, multilabel or detection.")],
    classes: Annotated[list[str], typer.Option(help="What annotators choose from, with commas between; may be given again.")],
    architecture: Annotated[
        str, typer.Option(help="pretrained (the problem type's default), a torchvision name, or custom (a small one to edit).")
    ] = "pretrained",
    weights: Annotated[
        str | None, typer.Option(help="imagenet, coco, none, or s3://bucket/key.pt.", show_default="as the architecture wants")
    ] = None,
    image_size: Annotated[
        str | None, typer.Option(help="Pixels: 224, or 320x240.", show_default="as the architecture wants")
    ] = None,
    train_at: Annotated[str, typer.Option(help="Numbers of annotations at which to train, rising.")] = "100,500,1000",
    title: Annotated[str | None, typer.Option(help="The Label Studio project's title.", show_default="labelloop MODEL")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the three files of a folder that exists.")] = False,
    as_json: AsJson = False,
) -> None:
    """Write a new model's folder: config.yaml, labeling_template.xml and model.py."""
    from cli.create import FILES, NewModel, create, models_folder, numbers_of

    wanted = NewModel(
        name=model,
        problem_type=problem_type,
        classes=tuple(name.strip() for given in classes for name in given.split(",")),
        architecture=architecture,
        weights=weights,
        image_size=numbers_of(image_size, "x", "--image-size") if image_size else None,
        train_at=numbers_of(train_at, ",", "--train-at"),
        title=title,
    )
    folder = create(models_folder(), wanted, force=force)
    commands = ["check {}", "up", "setup-label-studio-project {}", "upload-images {} FOLDER"]
    following = [f"labelloop {command.format(model)}" for command in commands]
    if as_json:
        files = [str(folder / name) for name in FILES]
        print(msgspec.json.encode({"model": model, "folder": str(folder), "files": files, "next": following}).decode())
        return
    console.print(f"made {folder}", highlight=False, soft_wrap=True, markup=False)
    _say_next(following)


@_command("check pets")
def check(
    model: Annotated[
        str | None, typer.Argument(help="Name of a folder under model_configs/.", show_default="all of them")
    ] = None,
    stage: Stage = "local",
    as_json: AsJson = False,
) -> None:
    """Find everything that is wrong with the models' configs, templates and networks, before it is deployed.

    Builds each network and tries it on images of noise. Downloads nothing and calls no service.
    """
    from cli.check import check as check_models

    configs = ModelConfigs.find()
    found = check_models(configs, [model] if model else configs.names, stage)
    if as_json:
        print(msgspec.json.format(msgspec.json.encode(found)).decode())
    for name, wrong in found.items() if not as_json else ():
        for line in [f"[red]wrong[/red] {escape(str(problem))}" for problem in wrong] or [f"[green]ok[/green]    {name}"]:
            console.print(line, highlight=False, soft_wrap=True)
    if any(found.values()):
        raise typer.Exit(2)


@_command("cost digits --labels 1000 --predictions 1000")
def cost(
    model: Annotated[
        str | None,
        typer.Argument(help="Name of a folder under model_configs/: the only one deployed.", show_default="all of them"),
    ] = None,
    predictions: Annotated[int, typer.Option(min=0, help="Tasks that each model predicts for people in a month.")] = 0,
    trainings: Annotated[
        int | None, typer.Option(min=0, help="Trainings of each model in a month.", show_default="those that --labels cause")
    ] = None,
    labels: Annotated[int, typer.Option(min=0, help="Annotations of each model in a month, its first.")] = 0,
    images: Annotated[int, typer.Option(min=0, help="Images of each model: stored, trained on, predicted anew.")] = 2000,
    image_kb: Annotated[float, typer.Option(min=0, help="Size of an image in kB.")] = 150,
    minutes: Annotated[
        float | None, typer.Option(min=0, help="Minutes of a training.", show_default="max_runtime_minutes of the config")
    ] = None,
    predict_ms: Annotated[float, typer.Option(min=0, help="Milliseconds of Lambda for a prediction.")] = 300,
    spot_share: Annotated[float, typer.Option(min=0, max=1, help="What spot costs of the price on demand.")] = 0.5,
    stage: Annotated[str, typer.Option(help="The stage whose stacks are priced.")] = "prod",
    region: Annotated[str, typer.Option(help="The region of AWS whose prices count.")] = "us-east-1",
    as_json: AsJson = False,
) -> None:
    """Say what a stage costs on AWS: idle, with this work, for each more of it, and beside machines that always run.

    Reads the templates that would be deployed and the dated prices of cli/prices.toml; calls no service and needs no account.
    """
    from cli import cost as costs
    from infra_cdk.stage_facts import read_facts

    prices = costs.PriceTable.read(region)
    configs = ModelConfigs.find()
    names = [model] if model else configs.names
    usage = costs.Usage(
        predictions=predictions,
        trainings=trainings,
        labels=labels,
        images=images,
        image_kb=image_kb,
        minutes=minutes,
        predict_ms=predict_ms,
        spot_share=spot_share,
    )
    facts = read_facts(stage)
    resources = costs.synthesize(configs, names, stage, facts)
    found = costs.report([configs[name].config for name in names], resources, usage, prices, stage, facts.region)
    if as_json:
        print(msgspec.json.format(msgspec.json.encode(found)).decode())
    else:
        costs.show(found, console)


@_command("config-schema --write")
def config_schema(
    write: Annotated[bool, typer.Option("--write", help="Write it beside the models, where their configs look for it.")] = False,
) -> None:
    """Print the JSON schema of config.yaml, which explains and checks every key in an editor."""
    from cli.create import models_folder, schema_text, write_schema

    if write:
        console.print(f"wrote {write_schema(models_folder())}", highlight=False, soft_wrap=True, markup=False)
    else:
        print(schema_text(), end="")


@_command("status --watch --stage prod")
def status(
    model: Annotated[
        str | None, typer.Argument(help="Name of a folder under model_configs/.", show_default="all of them")
    ] = None,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Go on looking, and show it live, until Ctrl-C.")] = False,
    every: Annotated[float, typer.Option(min=1, help="With --watch: seconds between looks.")] = 5,
    stage: Stage = "local",
    home: Home = None,
    as_json: AsJson = False,
) -> None:
    """Show versions, champion, annotations, when the next training is due and why, the running job, failures.

    --watch shows less of each model, and what moves: annotations, the running job's phase and epoch, queues, alarms, messages
    that were given up. It needs a terminal. A service that is away for a moment costs nothing but its figures, which then show
    their age. With --json a model gives an object, all of them an object by name.
    """
    from cli.status import read_status, show

    if watch and (as_json or not sys.stdout.isatty()):
        raise typer.BadParameter("needs a terminal; for scripts: labelloop status --json", param_hint="--watch")
    configs = ModelConfigs.find()
    folders = [configs[name] for name in ([model] if model else configs.names)]
    deployment = Deployment.find(stage, home)
    if watch:
        from cli import watch as live

        live.run(live.Watch(deployment, folders), console, every)
        return
    with problems.status("asking AWS, Label Studio and MLflow"):
        found = {folder.config.name: read_status(deployment, folder) for folder in folders}
    if as_json:
        print(msgspec.json.format(msgspec.json.encode(found[model] if model else found)).decode())
        return
    for number, one in enumerate(found.values()):
        if number:
            console.print()
        show(one, console)


@_command("report digits --open")
def report(
    model: Model,
    output: Annotated[
        Path | None, typer.Option(help="Where to write the page.", show_default="report-MODEL.html in this folder")
    ] = None,
    open_: Annotated[bool, typer.Option("--open", help="Show it in the browser.")] = False,
    stage: Stage = "local",
    home: Home = None,
    as_json: AsJson = False,
) -> None:
    """Write a page about a model: one HTML file that needs nothing else, to read, keep, or send to somebody.

    Learning curve with intervals and verdicts, confusion matrix, calibration, queue, labels saved, acceptance, turnaround of the
    last training, and what it costs on AWS. --json prints the same facts instead of writing a page.
    """
    if as_json and (output or open_):
        raise typer.BadParameter("prints the facts and writes no page; leave out --output and --open", param_hint="--json")
    configs = ModelConfigs.find()
    folder = configs[model]
    file = (output or Path(f"report-{model}.html")).resolve()
    if not file.parent.is_dir():
        raise typer.BadParameter(f"there is no folder {file.parent}", param_hint="--output")
    deployment = Deployment.find(stage, home)

    from cli import report as facts  # torch takes seconds to import

    found = facts.read_report(deployment, configs, folder)
    if as_json:
        print(msgspec.json.format(msgspec.json.encode(found)).decode())
        return
    from cli import report_page

    try:
        report_page.write(found, file)
    except OSError as error:
        raise ConfigError(str(file), f"cannot be written: {error.strerror}; name another file", "--output") from error
    console.print(f"wrote {file}", highlight=False, soft_wrap=True, markup=False)
    if open_ and not webbrowser.open(file.as_uri()):
        problems.print("there is no browser to open it with", highlight=False, soft_wrap=True)


@_command("retrain digits --wait")
def retrain(
    model: Model,
    wait: Annotated[bool, typer.Option("--wait", help="Wait for the training and for what the gate says of it.")] = False,
    minutes: Annotated[
        float | None, typer.Option(min=0, help="With --wait: how long at most.", show_default="as the model's config allows")
    ] = None,
    stage: Stage = "local",
    home: Home = None,
    as_json: AsJson = False,
) -> None:
    """Start a training now, with what is annotated, as Label Studio's button Start Training does.

    Counts and waiting times of the config do not hold it up, a training that runs does: then it comes next. Where nothing is new
    since the last one, none starts, and it says so. With --wait the exit code is 0 when the gate has decided, whatever it
    decided, or when nothing was new; 3 when the training failed or the time was over. Interrupted, the training goes on.
    """
    from cli import retrain as request

    heard = problems if as_json else console
    done = request.retrain(
        Deployment.find(stage, home),
        ModelConfigs.find()[model],
        lambda line: heard.print(line, highlight=False, soft_wrap=True, markup=False),
        wait=wait,
        minutes=minutes,
    )
    if as_json:
        print(msgspec.json.format(msgspec.json.encode(done)).decode())
    else:
        request.show(done, console)


@_command("train digits --instance ml.g5.2xlarge --stage prod")
def train(
    model: Model,
    instance: Annotated[
        str | None, typer.Option(help="SageMaker instance; a laptop ignores it.", show_default="the config's")
    ] = None,
    spot: Annotated[
        bool | None, typer.Option("--spot/--on-demand", help="Spare capacity or not.", show_default="as the config says")
    ] = None,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Follow the job to its end.")] = True,
    stage: Stage = "local",
    home: Home = None,
    as_json: AsJson = False,
) -> None:
    """Train a model once on another machine, to try something: the loop goes on, and what serves stays.

    The job has the deployed code, container, role and channels of the loop's own, and the last snapshot. Its version is
    registered in MLflow, with its evaluation; the gate does not hear of it. To train what was annotated since, and let the
    better version serve, there is labelloop retrain. Interrupted, the job goes on.
    """
    from cli import train as trial

    heard = problems if as_json else console
    done = trial.train(
        Deployment.find(stage, home),
        ModelConfigs.find()[model],
        lambda line: heard.print(line, highlight=False, soft_wrap=True, markup=False),
        instance_type=instance,
        spot=spot,
        wait=wait,
    )
    if as_json:
        print(msgspec.json.format(msgspec.json.encode(done)).decode())
    else:
        trial.show(done, console)


@_command("lineage digits --version 3 --rebuild")
def lineage(
    model: Model,
    prediction: Annotated[
        int | None, typer.Option(help="Id of a prediction in Label Studio: what made it, from which data?", show_default=False)
    ] = None,
    task: Annotated[
        int | None, typer.Option(help="Id of a task: which versions trained on its image?", show_default=False)
    ] = None,
    image: Annotated[
        str | None,
        typer.Option(help="The same of an image: a file, its s3:// address or its SHA-256.", show_default=False),
    ] = None,
    version: Annotated[
        int | None, typer.Option(help="A version: everything that was written down of it.", show_default=False)
    ] = None,
    rebuild: Annotated[
        bool, typer.Option("--rebuild", help="With --version: build its snapshot again and compare the digests.")
    ] = False,
    stage: Stage = "local",
    home: Home = None,
    as_json: AsJson = False,
) -> None:
    """Trace a prediction back to the annotations it was learnt from, or an image forward to the versions that saw it.

    A prediction leads to version, training job, dataset snapshot and annotations. An image leads to every version whose snapshot
    has it, or a near duplicate of it, and says in which split. --rebuild builds the snapshot of a version again, from the same
    annotations as Label Studio has them now: the digest is the same unless somebody changed or deleted one since, and then it
    says which, and the exit code is 2.
    """
    from cli import lineage as trace

    asked = [wanted for wanted in (prediction, task, image, version) if wanted is not None]
    if len(asked) != 1:
        raise typer.BadParameter("give one of --prediction, --task, --image and --version")
    if rebuild and version is None:
        raise typer.BadParameter("it is a version's snapshot that is built again: --version N --rebuild", param_hint="--rebuild")
    answers = trace.Lineage(Deployment.find(stage, home), ModelConfigs.find()[model])
    found: trace.Answer
    if version is not None:
        found = answers.rebuild(version) if rebuild else answers.of_version(version)
    elif prediction is not None:
        found = answers.of_prediction(prediction)
    elif task is not None:
        found = answers.of_task(task)
    else:
        found = answers.of_image(image or "")
    if as_json:
        print(msgspec.json.format(msgspec.json.encode(found)).decode())
    else:
        trace.show(found, console)
    if isinstance(found, trace.Rebuilt) and not found.same:
        raise typer.Exit(2)


@_command("setup-label-studio-project digits --check")
def setup_label_studio_project(
    model: Model,
    check: Annotated[
        bool, typer.Option("--check", help="Change nothing; say of each part whether it works, or what to do.")
    ] = False,
    stage: Stage = "local",
    home: Home = None,
    as_json: AsJson = False,
) -> None:
    """Create or update a model's Label Studio project from its config: storage, webhook and ML backend included.

    Running it twice changes nothing the second time.
    """
    from cli import doctor
    from cli.label_studio_project import set_up_project

    deployment, folder = Deployment.find(stage, home), ModelConfigs.find()[model]
    if check:
        checks = doctor.examine(deployment, folder)
        if as_json:
            print(msgspec.json.format(msgspec.json.encode({"model": model, "checks": checks})).decode())
        else:
            doctor.show(checks, console)
        if any(one.state == "fail" for one in checks):
            raise typer.Exit(2)
        return
    done = set_up_project(deployment, folder)
    if as_json:
        print(msgspec.json.encode({"project": done.project, "changes": done.changes}).decode())
        return
    for change in done.changes or ["nothing to change"]:
        console.print(change, highlight=False, soft_wrap=True)
    address = f"{deployment.label_studio_url}/projects/{done.project}"
    console.print(f"project {done.project} is set up: {address}", highlight=False, soft_wrap=True)


@_command("upload-images pets 'photos/**/*.jpg' --dry-run")
def upload_images(
    model: Model,
    paths: Annotated[
        list[str],
        typer.Argument(
            help="Images, folders of them, globs in quotes ('photos/**/*.jpg'), or CSV files (columns image, label).",
            show_default=False,
        ),
    ],
    labels_from_folders: Annotated[
        bool, typer.Option("--labels-from-folders", help="The folder directly above a file is its class: annotate it so.")
    ] = False,
    restore_deleted: Annotated[
        bool, typer.Option("--restore-deleted", help="Make a new task of images whose task was deleted in Label Studio.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and change nothing.")] = False,
    stage: Stage = "local",
    home: Home = None,
    as_json: AsJson = False,
) -> None:
    """Upload images for a model; each becomes a task. What is no image is listed and left out.

    What lies there already is not sent again: after an interruption run the same command again. Classes from folders or from a
    CSV file's column become annotations, which count for training like any other; tasks that have one are left alone.
    """
    from cli import upload
    from cli.image_sources import gather

    folder = ModelConfigs.find()[model]
    sources = gather(paths, folder.config, labels_from_folders=labels_from_folders)
    report = upload.run(
        Deployment.find(stage, home),
        folder,
        sources,
        problems if as_json else console,
        dry_run=dry_run,
        restore_deleted=restore_deleted,
    )
    if as_json:
        print(msgspec.json.encode(report).decode())
    else:
        upload.show(report, console)
    if report.refused:
        raise typer.Exit(2)


@_command("rollback digits --to 2 --reason 'sevens are read as ones'")
def rollback(
    model: Model,
    to: Annotated[
        int | None, typer.Option(min=1, help="The version to go back to.", show_default="the one that served before")
    ] = None,
    reason: Annotated[str | None, typer.Option(help="Why; kept in the ledger and the registry.", show_default=False)] = None,
    stage: Stage = "local",
    home: Home = None,
    as_json: AsJson = False,
) -> None:
    """Let the version serve again that served before, within seconds.

    Nothing is trained and nothing deleted: the champion pointer moves, Label Studio gets the old version's predictions again,
    and later versions are compared with it. Run twice, it goes back two versions. Where the command was interrupted, run it
    again: it finishes what it began.
    """
    from cli import takeover

    done = takeover.rollback(Deployment.find(stage, home), ModelConfigs.find()[model].config.name, to, reason)
    _say_takeover(done, as_json=as_json)


@_command("promote digits 3 --reason 'sevens matter most'")
def promote(
    model: Model,
    version: Annotated[int, typer.Argument(min=1, help="The version that shall serve.", show_default=False)],
    reason: Annotated[str, typer.Option(help="Why; kept in the ledger and the registry.", show_default=False)],
    stage: Stage = "local",
    home: Home = None,
    as_json: AsJson = False,
) -> None:
    """Let any trained version serve, whatever the promotion gate said of it.

    For what the gate cannot know, such as a class that matters more than the others, or a verdict that it left undecided.
    `labelloop status MODEL` lists versions and verdicts; `labelloop rollback MODEL` takes it back.
    """
    from cli import takeover

    done = takeover.promote(Deployment.find(stage, home), ModelConfigs.find()[model].config.name, version, reason)
    _say_takeover(done, as_json=as_json)


@_command("rotate-secrets digits")
def rotate_secrets(model: Model, stage: Stage = "local", home: Home = None, as_json: AsJson = False) -> None:
    """Give a model's backend a new password, in Secrets Manager and in Label Studio, while annotators go on.

    Both passwords are valid until Label Studio has the new one. Then the old one ends, API Gateway is made to forget it, and
    both are tried at the API. It takes about half a minute; where it was interrupted, run it again: it goes on where it stopped.
    """
    from cli import rotation

    heard = problems if as_json else console
    done = rotation.rotate(
        Deployment.find(stage, home),
        ModelConfigs.find()[model],
        lambda step: heard.print(step, highlight=False, soft_wrap=True, markup=False),
    )
    if as_json:
        print(msgspec.json.encode(done).decode())
    else:
        rotation.show(done, console)


@_command("erase digits --image portrait.jpg --reason 'asked for on 3 May'")
def erase(
    model: Model,
    image: Annotated[
        list[str],
        typer.Option(help="The image: its s3:// address, its name below the model's prefix, or its SHA-256; may be given again."),
    ],
    reason: Annotated[str, typer.Option(help="Why, and who asked for it; kept in the ledger.")] = "",
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    stage: Stage = "local",
    home: Home = None,
    as_json: AsJson = False,
) -> None:
    """Erase an image everywhere it lives, for good, and say which versions have learnt from it.

    All versions in S3, under every name that has the same content, and all that ever lay under the given name; the task with its
    annotations and predictions; what the ledger, dataset snapshots, reports and MLflow say of it. A record stays, with the
    image's hash, the time, who and why. Versions that were trained on it are not changed. Where it was interrupted, run it
    again: it finishes. Not while a training runs, which would write the image down once more.
    """
    from cli import erasure

    if as_json and not yes:
        raise typer.BadParameter("nobody can be asked with --json; add --yes", param_hint="--yes")
    deployment = Deployment.find(stage, home)
    eraser = erasure.Eraser(deployment, ModelConfigs.find()[model])
    plan = eraser.plan(image)
    if not as_json:
        erasure.show_plan(plan, console)
    if (plan.images or plan.unfinished) and not yes and not _confirmed("Erase this for good?"):
        console.print("nothing was erased")
        raise typer.Exit(2)
    done = eraser.erase(plan, erasure.caller(), reason)
    if as_json:
        print(msgspec.json.format(msgspec.json.encode(done)).decode())
    else:
        erasure.show(done, console, deployment=deployment)


@_command("redrive digits --queue prelabel --list")
def redrive(
    model: Annotated[
        str | None, typer.Argument(help="Only messages about this model, and those about all.", show_default="all of them")
    ] = None,
    queue: Annotated[
        str | None, typer.Option(help="Only this one: ingest, retrain, promote, refresh or prelabel.", show_default="all of them")
    ] = None,
    list_: Annotated[bool, typer.Option("--list", help="Only show what lies there; it stays there.")] = False,
    stage: Stage = "local",
    home: Home = None,
    as_json: AsJson = False,
) -> None:
    """Put messages that were given up back into their queues, once what they failed at is mended.

    They lie in the dead-letter queues for two weeks, and an alarm says so. --list shows them: which queue, how many, how old,
    what they say; the function's log says why they failed. Nothing is lost when this is interrupted: run it again. A message
    that goes on failing comes back.
    """
    from cli import redrive as dead_letters

    if model is not None:
        ModelConfigs.find()[model]
    try:
        queues = [dead_letters.parse_queue(queue)] if queue else list(dead_letters.QUEUES)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--queue") from None
    act = dead_letters.look if list_ else dead_letters.redrive
    deployment = Deployment.find(stage, home)
    found = act(deployment, queues, model)
    if as_json:
        print(msgspec.json.format(msgspec.json.encode({"queues": found})).decode())
    elif list_:
        dead_letters.show_list(found, console, deployment=deployment)
    else:
        dead_letters.show_moved(found, console)


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


def _confirmed(question: str) -> bool:
    """Whether somebody says yes. Without anybody there to ask, it is a no."""
    try:
        return typer.confirm(question)
    except typer.Abort:
        return False


def _say_takeover(outcome: Outcome, *, as_json: bool) -> None:
    from cli import takeover

    if as_json:
        print(msgspec.json.encode(outcome).decode())
    else:
        takeover.show(outcome, console)


def _say_next(commands: list[str]) -> None:
    for number, command in enumerate(commands):
        console.print(f"{'next:' if number == 0 else '':<6}{command}", highlight=False, soft_wrap=True, markup=False)


def _say(part: str, message: str, to: Console = console) -> None:
    to.print(f"[cyan]{escape(part):<13}[/cyan] {escape(message)}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
