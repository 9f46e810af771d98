"""How fast the training job trains, against torchvision's reference recipe and against the same steps without any data.

    uv run python -m benchmarks.training [--model mobilenet_v2] [--images 960] [--epochs 8] [--size 96] [--seeds 3] [--goal 0.75]
                                         [--longer EPOCHS] [--device auto] [--json FILE] [--plot FILE]

Runs, each in a process of its own, of the same torchvision network from random weights, for the same epochs over the same JPEG
files, with the same images held out:

- *ours*: the training job's own reading, decoding and fit, on augmented images as `architectures.augmentation` makes them;
  with --longer once more, for that many epochs: what it makes of the time that the reference takes;
- *reference*: what torchvision's references/classification does: a DataLoader whose workers decode every file anew in each epoch
  with Pillow, a random crop scaled to the size, a mirror image at random, SGD with momentum and a falling cosine, float32. It
  is trained with each of three learning rates by the first seed, and the one that ends with most of the held-out images right
  counts, which favours it: ours stays as configured. Its accuracy is that of the last weights, ours that of the averaged ones;
- *limit*: ours without data: the network's steps on one batch that is there already, no augmentation, no average of the weights.

The images are details of scikit-image's photographs; the class is the photograph that a detail comes from. MobileNetV3 wants many
more epochs to say anything by its accuracy: its batch norm's averages move by a hundredth each step.
"""

from __future__ import annotations

import argparse
import hashlib
import multiprocessing
import os
import platform
import random
import resource
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

import msgspec

from benchmarks import note

if TYPE_CHECKING:
    from training_jobs.fit import Epoch

_PHOTOGRAPHS = ("astronaut", "brick", "camera", "chelsea", "coffee", "coins", "grass", "gravel", "moon", "rocket")
_DETAIL = (90, 220)  # pixels of a photograph that a detail is wide
_JPEG = (400, 300)  # its size as a file
_HELD_OUT = 0.25  # relative to the images that are trained on
_BATCH = 32
_LEARNING_RATE = 0.003  # ours
_REFERENCE_RATES = (0.01, 0.03, 0.1)
_LIMIT_STEPS = 40

_CONFIG = """
name: details
problem_type: classification
classes: [{classes}]
architecture: {{name: {model}, weights: none}}
image: {{width: {size}, height: {size}, mode: RGB}}
hyperparameters: {{epochs: {epochs}, batch_size: {batch}, learning_rate: {rate}, weight_decay: 0.01, seed: {seed}}}
label_studio: {{title: details}}
retrain: {{at: [10]}}
"""

_MODEL = """
from training_jobs import architectures


def build_model(config, weights):
    return architectures.build(config, weights)


def augmentation(config):
    return architectures.augmentation(config)
"""


class Task(msgspec.Struct, frozen=True, kw_only=True):
    """What is trained. `folder` holds the images and, for ours, what stands for /opt/ml. `rate`: the reference's."""

    folder: str
    model: str
    images: int
    epochs: int
    size: int
    seed: int = 0
    rate: float = _REFERENCE_RATES[0]
    title: str = "ours"


class Point(msgspec.Struct, frozen=True):
    """After an epoch: time since the start without what measuring took, and the share of the held-out images right."""

    seconds: float
    cpu_seconds: float
    accuracy: float


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """One run. `images_per_second` and `cpu_seconds_per_image`: over reading, decoding and all steps, without the measuring.

    `waiting`: share of the steps' time that went by until images were there. `threads`: of torch in the steps.
    """

    name: str
    seed: int
    rate: float | None
    device: str
    threads: int
    images_per_second: float
    cpu_seconds_per_image: float
    waiting: float | None
    curve: list[Point]


class Stopwatch:
    """Seconds and CPU seconds, workers' too, without those of what is left out."""

    def __init__(self) -> None:
        self.seconds = self.cpu = 0.0
        self.go_on()

    def go_on(self) -> None:
        self._began = time.perf_counter(), _cpu_seconds()

    def stop(self) -> None:
        self.seconds += time.perf_counter() - self._began[0]
        self.cpu += _cpu_seconds() - self._began[1]


def make_images(folder: Path, count: int) -> None:
    """JPEG files `{class}-{number}.jpg`, as many of each class."""
    import numpy as np
    from PIL import Image
    from skimage import data

    chance = random.Random(0)
    photographs = {name: Image.fromarray(np.asarray(getattr(data, name)())).convert("RGB") for name in _PHOTOGRAPHS}
    for number in range(count):
        name = _PHOTOGRAPHS[number % len(_PHOTOGRAPHS)]
        photograph = photographs[name]
        width = chance.uniform(*_DETAIL)
        height = width * _JPEG[1] / _JPEG[0]
        x, y = chance.uniform(0, photograph.width - width), chance.uniform(0, photograph.height - height)
        detail = photograph.resize(_JPEG, Image.Resampling.BICUBIC, box=(x, y, x + width, y + height))
        detail.save(folder / f"{name}-{number:05}.jpg", quality=90)


def split(folder: Path, count: int) -> tuple[list[Path], list[Path]]:
    """The files to train on, `count` of them, and those that are held out."""
    files = sorted(folder.glob("*.jpg"))
    random.Random(1).shuffle(files)
    return files[:count], files[count:]


def ours(task: Task) -> Result:
    """The training job's own steps from the files to the trained network."""
    import torch

    from training_jobs import network, problem
    from training_jobs.fit import Epoch, candidates, fit, make_repeatable
    from training_jobs.job import Phases

    folder, config = _model(task)
    card = config.card("")
    make_repeatable(task.seed, exact=True)
    fresh, augment = network.build(folder, None)
    watch, phases, epochs, used = Stopwatch(), Phases(), list[Epoch](), list[float]()
    began = _cpu_seconds()
    data = _load(task, config, card, phases)
    watch.stop()
    reading = watch.seconds
    watch.go_on()

    def done(epoch: Epoch) -> None:
        epochs.append(epoch)
        used.append(_cpu_seconds() - began)
        say_epoch(task.title, task, epoch.number, reading + sum(each.seconds for each in epochs), held_out(epoch))

    trained = fit(fresh, data, config, card, augment, _place(task) / "checkpoint.pt", done)
    watch.stop()
    measuring = Stopwatch()  # fit measures after every epoch; once more tells what that took
    list(candidates(problem.of(config.problem_type).heads(trained), data.validation.pixels, card))
    measuring.stop()
    spent = [epoch.seconds for epoch in epochs]
    images, seconds = sum(epoch.images for epoch in epochs), reading + sum(spent)
    return Result(
        name=task.title,
        seed=task.seed,
        rate=_LEARNING_RATE,
        device=_device(),
        threads=torch.get_num_threads(),
        images_per_second=images / seconds,
        cpu_seconds_per_image=(watch.cpu - len(epochs) * measuring.cpu) / images,
        waiting=sum(epoch.waited for epoch in epochs) / sum(spent),
        curve=[
            Point(reading + sum(spent[: epoch.number]), cpu - epoch.number * measuring.cpu, held_out(epoch))
            for epoch, cpu in zip(epochs, used, strict=True)
        ],
    )


def held_out(epoch: Epoch) -> float:
    """The share of the held-out images right after an epoch. Raises `ValueError` where nothing was measured: that is no 0 %."""
    if epoch.validation is None:
        raise ValueError(f"nothing was measured after epoch {epoch.number}: no image is held out")
    return epoch.validation


def reference(task: Task) -> Result:
    """torchvision's recipe, from the same files to a trained network."""
    import torch
    from torch import nn
    from torch.utils.data import DataLoader
    from torchvision import models
    from torchvision.transforms import v2

    train, _ = split(Path(task.folder), task.images)
    torch.manual_seed(task.seed)
    device = torch.device(_device())
    published = models.get_model_weights(task.model).DEFAULT.transforms()
    prepare = v2.Compose(
        [
            v2.RandomResizedCrop(task.size, antialias=True),
            v2.RandomHorizontalFlip(),
            v2.PILToTensor(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(published.mean, published.std),
        ]
    )
    workers = min(16, os.process_cpu_count() or 1)
    files: Any = _Files(train, prepare)
    loader: Any = DataLoader(
        files,
        batch_size=_BATCH,
        shuffle=True,
        num_workers=workers,
        pin_memory=device.type == "cuda",
    )
    network = models.get_model(task.model, weights=None, num_classes=len(_PHOTOGRAPHS)).to(device)
    criterion = nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(network.parameters(), lr=task.rate, momentum=0.9, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=task.epochs)
    measure = _holdout(task, published)
    watch, waited, curve = Stopwatch(), 0.0, []
    for epoch in range(1, task.epochs + 1):
        network.train()
        asked = time.perf_counter()
        for images, targets in loader:
            waited += time.perf_counter() - asked
            images, targets = images.to(device, non_blocking=True), targets.to(device, non_blocking=True)
            loss = criterion(network(images), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            asked = time.perf_counter()
        loss.item()
        schedule.step()
        watch.stop()
        curve.append(Point(watch.seconds, watch.cpu, measure(network)))
        say_epoch("reference", task, epoch, watch.seconds, curve[-1].accuracy)
        watch.go_on()
    images_seen = task.epochs * task.images
    return Result(
        name="reference",
        seed=task.seed,
        rate=task.rate,
        device=device.type,
        threads=torch.get_num_threads(),
        images_per_second=images_seen / watch.seconds,
        cpu_seconds_per_image=watch.cpu / images_seen,
        waiting=waited / watch.seconds,
        curve=curve,
    )


def limit(task: Task) -> Result:
    """The network's steps alone, as ours are made, on one batch that stays where it is."""
    import torch

    from training_jobs import network, problem
    from training_jobs.export import to_network
    from training_jobs.fit import make_repeatable, on_gpu, threads

    folder, config = _model(task)
    make_repeatable(0, exact=True)
    fresh, _ = network.build(folder, None)
    device = torch.device(_device())
    trained = fresh.to(device).to(memory_format=torch.channels_last)
    if device.type == "cuda":
        forward = on_gpu(trained, compiled=False)
    else:
        forward = trained
        torch.set_num_threads(threads(problem.of(config.problem_type).heads(trained.eval()), config))
    trained.train()
    images = to_network(torch.randint(0, 256, (_BATCH, task.size, task.size, 3), dtype=torch.uint8).to(device))
    targets = torch.randint(0, len(_PHOTOGRAPHS), (_BATCH,)).to(device)
    optimizer = torch.optim.AdamW(trained.parameters(), lr=1e-3, fused=device.type == "cuda")

    def steps(count: int) -> None:
        for _ in range(count):
            loss = torch.nn.functional.cross_entropy(forward(images), targets)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        loss.item()

    steps(5)
    watch = Stopwatch()
    steps(_LIMIT_STEPS)
    watch.stop()
    return Result(
        name="limit",
        seed=task.seed,
        rate=None,
        device=device.type,
        threads=torch.get_num_threads(),
        images_per_second=_LIMIT_STEPS * _BATCH / watch.seconds,
        cpu_seconds_per_image=watch.cpu / (_LIMIT_STEPS * _BATCH),
        waiting=None,
        curve=[],
    )


class _Files:
    """torchvision's ImageFolder: a file is opened and decoded whenever its image is asked for."""

    def __init__(self, files: Sequence[Path], prepare: Callable[[Any], Any]) -> None:
        self._files, self._prepare = files, prepare

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, number: int) -> tuple[Any, int]:
        from PIL import Image

        file = self._files[number]
        with Image.open(file) as image:
            return self._prepare(image.convert("RGB")), _PHOTOGRAPHS.index(_class(file))


def _holdout(task: Task, published: Any) -> Callable[[Any], float]:
    """Measures a network on the held-out images, decoded as ours are."""
    import numpy as np
    import torch

    from labelloop import imaging

    _, files = split(Path(task.folder), task.images)
    decoded = [imaging.decode(file.read_bytes(), width=task.size, height=task.size, mode="RGB") for file in files]
    pixels = torch.from_numpy(np.array([np.asarray(image) for image in decoded])).permute(0, 3, 1, 2).float() / 255
    pixels = (pixels - torch.tensor(published.mean).view(-1, 1, 1)) / torch.tensor(published.std).view(-1, 1, 1)
    truth = torch.tensor([_PHOTOGRAPHS.index(_class(file)) for file in files])

    def accuracy(network: Any) -> float:
        network.eval()
        device = next(network.parameters()).device
        with torch.inference_mode():
            best = torch.cat([network(batch.to(device)).argmax(dim=1).cpu() for batch in torch.split(pixels, 128)])
        return float((best == truth).float().mean())

    return accuracy


def _model(task: Task) -> tuple[Any, Any]:
    from labelloop.model_config import ModelFolder

    folder = Path(task.folder) / "model_configs/details"
    folder.mkdir(parents=True, exist_ok=True)
    text = _CONFIG.format(
        classes=", ".join(_PHOTOGRAPHS), model=task.model, size=task.size, epochs=task.epochs, batch=_BATCH, rate=_LEARNING_RATE,
        seed=task.seed,
    )  # fmt: skip
    (folder / "config.yaml").write_text(text)
    (folder / "model.py").write_text(_MODEL)
    found = ModelFolder(folder)
    return found, found.config


def _place(task: Task) -> Path:
    """What stands for /opt/ml: fresh for each run, so that nothing is kept from one to the next."""
    return Path(task.folder) / f"ml-{task.seed}-{task.epochs}"


def _load(task: Task, config: Any, card: Any, phases: Any) -> Any:
    """The files as a snapshot, read and decoded as the job does it; what is held out is the validation split."""
    from labelloop.records import ManifestRow, Region
    from training_jobs import dataset
    from training_jobs.dataset import Dataset
    from training_jobs.job import TrainingJob

    place = _place(task)
    for name in ("manifest", "images"):
        (place / "input/data" / name).mkdir(parents=True)
    train, held_out = split(Path(task.folder), task.images)

    def rows() -> Iterator[ManifestRow]:
        for number, file in enumerate([*train, *held_out]):
            (place / "input/data/images" / file.name).hardlink_to(file)
            digest = hashlib.sha256(file.read_bytes()).hexdigest()
            yield ManifestRow(
                image=f"s3://images/{config.images_prefix}{file.name}", sha256=digest, group=digest,
                regions=[Region(label=_class(file))], split="train" if number < len(train) else "test",
                annotation=str(number), task=number,
            )  # fmt: skip

    manifest = b"".join(msgspec.json.encode(row) + b"\n" for row in rows())
    (place / "input/data/manifest/manifest.jsonl").write_bytes(manifest)
    job = TrainingJob(place, config.name, hashlib.sha256(manifest).hexdigest(), task.images, "job", None, None)
    found = dataset.load(job, config, card, phases)
    return Dataset(train=found.train, validation=found.test, test=found.test, decoded=found.decoded)


def _class(file: Path) -> str:
    return file.name.partition("-")[0]


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _cpu_seconds() -> float:
    return sum(
        used.ru_utime + used.ru_stime for used in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    )


def called(name: str, task: Task) -> str:
    """A run, for a person."""
    return f"{name}, seed {task.seed}" + (f", learning rate {task.rate}" if name == "reference" else "")


def say_epoch(name: str, task: Task, epoch: int, seconds: float, accuracy: float) -> None:
    """Minutes go by until a run has its result."""
    note(f"{called(name, task)}: epoch {epoch} of {task.epochs}, {seconds:.0f} s, {accuracy:.1%} of the held-out images right")


def compare(
    task: Task, seeds: int, each: Callable[[Callable[[Task], Result], Task], Result], *, longer: int | None = None
) -> tuple[list[Result], list[Result]]:
    """The runs that count, and those of the first seed's search for the reference's learning rate. `each` makes a run.

    `longer`: epochs of another run of ours with each seed.
    """
    runs, grid = [each(limit, task)], list[Result]()
    for seed in range(seeds):
        seeded = msgspec.structs.replace(task, seed=seed)
        runs.append(each(ours, seeded))
        if longer:
            runs.append(each(ours, msgspec.structs.replace(seeded, epochs=longer, title=f"ours, {longer} epochs")))
        if not grid:
            grid = [each(reference, msgspec.structs.replace(seeded, rate=rate)) for rate in _REFERENCE_RATES]
            best = max(grid, key=lambda result: result.curve[-1].accuracy)
            task = msgspec.structs.replace(task, rate=best.rate)
            runs.append(best)
        else:
            runs.append(each(reference, seeded))
    return runs, grid


def reached(result: Result, accuracy: float) -> Point | None:
    """The first epoch's end by which a run was so accurate."""
    return next((point for point in result.curve if point.accuracy >= accuracy), None)


def table(results: Sequence[Result], goal: float) -> str:
    """As Markdown, a row for all runs of a name: means, with the least and the most where these differ."""
    fastest = next((result.images_per_second for result in results if result.name == "limit"), None)
    heads = (
        "run",
        "seeds",
        "threads",
        "images/s",
        "CPU ms per image",
        "waiting",
        "accuracy",
        "s in all",
        f"s to {goal:.0%}",
        f"CPU s to {goal:.0%}",
    )
    rows: list[Sequence[str]] = [(*heads, "share of the limit")]
    for name in dict.fromkeys(result.name for result in results):
        runs = [result for result in results if result.name == name]
        there = [point for run in runs if (point := reached(run, goal))]
        missed = f", {len(there)} of {len(runs)} runs" if len(there) < len(runs) else ""
        rate = mean(run.images_per_second for run in runs)
        rows.append(
            (
                name,
                str(len(runs)),
                str(runs[0].threads),
                _spread([run.images_per_second for run in runs], "{:.0f}"),
                _spread([1000 * run.cpu_seconds_per_image for run in runs], "{:.1f}"),
                _spread([run.waiting for run in runs if run.waiting is not None], "{:.1%}"),
                _spread([run.curve[-1].accuracy for run in runs if run.curve], "{:.1%}"),
                _spread([run.curve[-1].seconds for run in runs if run.curve], "{:.0f}"),
                _spread([point.seconds for point in there], "{:.0f}") + (missed if there else ""),
                _spread([point.cpu_seconds for point in there], "{:.0f}") + (missed if there else ""),
                f"{rate / fastest:.0%}" if fastest else "–",
            )
        )
    head, *rest = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([head, "|---" * len(rows[0]) + "|", *rest])


def _spread(values: Sequence[float], form: str) -> str:
    if not values:
        return "–"
    least, middle, most = (form.format(value) for value in (min(values), mean(values), max(values)))
    return middle if least == most else f"{middle} ({least}–{most})"


def draw(results: Sequence[Result], goal: float, file: Path) -> None:
    """Accuracy over the seconds, a line for each run, as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    labels = {"ours": "labelloop", "reference": "torchvision's recipe"}
    colours = {"ours": "C0", "reference": "C1"}
    named = set[str]()
    for result in results:
        if result.curve:
            label = labels.get(result.name, result.name.replace("ours", "labelloop"))
            colour = colours.get(result.name, "C2")
            across, up = [point.seconds for point in result.curve], [100 * point.accuracy for point in result.curve]
            axes.plot(across, up, "o-", ms=3.5, color=colour, label=None if label in named else label)
            named.add(label)
    axes.axhline(100 * goal, color="grey", lw=0.8, ls=":")
    axes.set(xlabel="seconds", ylabel="held-out images right, %", title="The training job and torchvision's recipe")
    axes.set_xlim(left=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description="Images per second and time to an accuracy of the training job's fit")
    parser.add_argument("--model", default="mobilenet_v2", help="a torchvision classifier")
    parser.add_argument("--images", type=int, default=960, help="images to train on, at least 30 batches of 32")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--size", type=int, default=96, help="pixels, width and height of the network's input")
    parser.add_argument("--seeds", type=int, default=3, help="runs of ours and of the reference (default: %(default)s)")
    parser.add_argument("--longer", type=int, metavar="EPOCHS", help="train ours for so many epochs, too")
    parser.add_argument("--goal", type=float, default=0.75, help="accuracy to which time is measured (default: %(default)s)")
    parser.add_argument("--device", choices=("auto", "cpu"), default="auto")
    parser.add_argument("--json", type=Path, help="write all runs to this file too")
    parser.add_argument("--plot", type=Path, help="draw the accuracy over the seconds into this PNG")
    options = parser.parse_args()
    if options.images < 30 * _BATCH:
        parser.error(f"an epoch has at least 30 steps, so that fewer than {30 * _BATCH} images would come more often than once")
    if options.longer is not None and options.longer <= options.epochs:
        parser.error(f"--longer is more than the {options.epochs} epochs that both are trained for")
    if options.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    with tempfile.TemporaryDirectory() as scratch:
        task = Task(folder=scratch, model=options.model, images=options.images, epochs=options.epochs, size=options.size)
        count = round(options.images * (1 + _HELD_OUT))
        note(f"making {count:,} images")
        make_images(Path(scratch), count)
        alone = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, mp_context=alone, max_tasks_per_child=1) as one_at_a_time:

            def each(run: Callable[[Task], Result], task: Task) -> Result:
                note(called(task.title if run is ours else run.__name__, task))
                return one_at_a_time.submit(run, task).result()

            results, grid = compare(task, options.seeds, each, longer=options.longer)
    title = f"{options.model}, {options.size} × {options.size} pixels, {options.images} images, {options.epochs} epochs"
    print(f"{title}; {results[0].device}, {os.process_cpu_count()} cores, {platform.machine()}")
    found = ", ".join(f"{result.curve[-1].accuracy:.1%} with {result.rate}" for result in grid)
    print(f"the reference's accuracy by its learning rate, first seed: {found}\n")
    print(table(results, options.goal))
    if options.json:
        options.json.write_bytes(msgspec.json.format(msgspec.json.encode({"runs": results, "rates": grid})))
    if options.plot:
        draw(results, options.goal, options.plot)


if __name__ == "__main__":
    main()
