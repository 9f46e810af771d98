"""Training: from a fresh network to the average of its weights, resumable at any step.

Whatever is random in a step follows from the config's seed and the step's number alone, so a resumed training ends with the
weights that an uninterrupted one would have.
"""

from __future__ import annotations

import logging
import math
import os
import pickle
import sys
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.flop_counter import FlopCounterMode

from labelloop import problem_types
from labelloop.errors import ConfigError
from labelloop.model_config import ModelConfig
from labelloop.records import ModelCard, Region
from labelloop.wording import counted
from training_jobs import problem, ranks
from training_jobs.dataset import Dataset, Examples, Numbers, Pixels
from training_jobs.export import to_network
from training_jobs.heads import Heads
from training_jobs.job import STOPPED, stop_noted
from training_jobs.problem import Augment

log = logging.getLogger(__name__)

_STEPS_AN_EPOCH = 30  # at least: a first training on some seventy images would otherwise end before it has learnt
_WARM_UP = 0.1  # share of the steps in which the learning rate rises
_AVERAGED = 1 / 16  # share of the steps that the averaged weights look back on
_PLAIN_ROUNDS = 5  # over the images, the last ones, that go without augmentation: repeated no more, they need none
_NORM_BATCHES = 8  # batches from which the averaged weights get batch-norm statistics of their own
_CHECKPOINTS = 10  # in a training
_FORWARD_AND_BACK = 3  # a step's operations, relative to those of its forward pass
_A_THREADS_WORK = 500_000_000  # operations of a step from which another thread brings more than it costs
_RESIDENT = 0.25  # share of a GPU's free memory that the images may take, so that no batch has to travel
_AHEAD = 2  # batches that are gathered before the step that wants them
_COMPILED_FROM = 10_000  # steps on a GPU; compiling takes a minute or two


@dataclass(frozen=True)
class Epoch:
    """What an epoch came to. `validation` is the problem type's metric, a share, or None where nothing can be measured.

    `seconds`: of the steps on `images`, of which `waited` went by until batches were there.
    """

    number: int
    of: int
    loss: float
    validation: float | None
    learning_rate: float
    seconds: float
    images: int
    waited: float

    @property
    def notable(self) -> bool:
        """Whether to speak of it: about twenty epochs of a training."""
        return self.number == self.of or self.number % math.ceil(self.of / 20) == 0


def make_repeatable(seed: int, *, exact: bool) -> None:
    """The same snapshot gives the same weights on the same kind of machine.

    On a GPU that holds where `exact` says so and every operation has a kernel that repeats itself; torch warns of others.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is deterministic only with a fixed workspace
    torch.use_deterministic_algorithms(exact or not torch.cuda.is_available(), warn_only=True)
    torch.backends.cudnn.benchmark = False
    torch.manual_seed(seed)


def threads(heads: Heads, config: ModelConfig) -> int:
    """How many threads pay in a training step on a CPU.

    By the network's cost alone, not by timing: sums depend on the number, and the same snapshot has to give the same weights on
    the same kind of machine. A small network's steps are slower with several, many times so beside other work.
    """
    image = config.image
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        heads(torch.zeros(1, 1 if image.mode == "L" else 3, image.height, image.width))
    operations = _FORWARD_AND_BACK * config.hyperparameters.batch_size * counter.get_total_flops()
    return max(1, min(int(operations / _A_THREADS_WORK + 0.5), cores()))


def cores() -> int:
    """Of this process: what `os.process_cpu_count` says from Python 3.13 on. SageMaker's image has 3.12."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def fit(
    network: nn.Module,
    data: Dataset,
    config: ModelConfig,
    card: ModelCard,
    augment: Augment,
    checkpoint: Path,
    report: Callable[[Epoch], None],
) -> nn.Module:
    """Train on the train split and return a network of the same kind with the averaged weights, in evaluation mode.

    `card` is the trained model's; `report` hears of every epoch. SIGTERM saves the state to `checkpoint` and ends the
    process; a checkpoint of the same config is gone on from. Several ranks share each batch. Raises `ConfigError` when the loss
    is no number any more, or there are more ranks than images in a batch.
    """
    if config.hyperparameters.batch_size < ranks.count():
        raise ConfigError(
            "config.yaml",
            f"{counted(config.hyperparameters.batch_size, 'image')} cannot be shared by the {ranks.count()} GPUs of the training "
            "instance; "
            "raise it, or take a smaller training.instance_type",
            "hyperparameters.batch_size",
        )
    ranks.share(ranks.Shared(data.train, config, card, checkpoint))
    training = _Training(network, data.train, config, augment)
    done = training.resume(checkpoint)
    epochs, steps = config.hyperparameters.epochs, training.steps_an_epoch
    with stop_noted() as stop:
        for epoch in range(done // steps, epochs):
            began, waited, losses = time.monotonic(), training.feed.waited, []
            first = max(done, epoch * steps)
            batches = training.batches(epoch)[first % steps :]
            own = ranks.part(batches)
            for step, (batch, images) in enumerate(zip(own, training.feed.batches(own), strict=True), first):
                losses.append(training.step(step, batch, images))
                if ranks.any_of(flag=stop.is_set()):
                    training.save(checkpoint, step + 1)
                    log.info("told to stop; step %d of %d is saved", step + 1, epochs * steps)
                    sys.exit(STOPPED)
            averaged = training.averaged(epoch) if data.validation.measurable else None
            loss = ranks.mean(torch.stack(losses).mean())  # a GPU has done its work when this is known
            seconds, waited = time.monotonic() - began, training.feed.waited - waited
            if not math.isfinite(loss):
                raise ConfigError(
                    "config.yaml", f"the loss is {loss} after epoch {epoch + 1}; try less", "hyperparameters.learning_rate"
                )
            validation = None if averaged is None else score(averaged, data.validation, config, card)
            report(Epoch(epoch + 1, epochs, loss, validation, training.learning_rate(step), seconds, batches.numel(), waited))
            if (epoch + 1) % math.ceil(epochs / _CHECKPOINTS) == 0 or epoch + 1 == epochs:
                training.save(checkpoint, (epoch + 1) * steps)
        if ranks.any_of(flag=stop.is_set()):  # while the last epoch was measured; its checkpoint is there
            log.info("told to stop; all %d steps are saved", epochs * steps)
            sys.exit(STOPPED)
    return training.averaged(epochs - 1).to(memory_format=torch.contiguous_format)


def candidates(heads: Heads, pixels: Pixels, card: ModelCard, numbers: Numbers | None = None) -> Iterator[list[Region]]:
    """All that a network in evaluation mode takes into consideration for each image, reckoned as serving does it.

    `numbers`: of the images in question, if not all are.
    """
    problem_type, device = problem_types.of(card.problem_type), next(heads.parameters()).device
    for batch in heads.batches(pixels, numbers):
        with torch.inference_mode():
            outputs = [output.cpu().numpy() for output in heads(to_network(batch.to(device)))]
        yield from (problem_type.candidates(image, card) for image in zip(*outputs, strict=True))


def score(network: nn.Module, examples: Examples, config: ModelConfig, card: ModelCard) -> float:
    """The metric of a network, which is left in evaluation mode."""
    kind = problem.of(config.problem_type)
    kept = [kind.kept(found, card) for found in candidates(kind.heads(network).eval(), examples.mapped, card, examples.numbers)]
    return kind.scores(examples.rows, kept, config.classes, version=0).value


class HalfPrecision(nn.Module):
    """A network whose layers reckon in bfloat16 where that is safe; augmentation and loss stay outside, in float32."""

    def __init__(self, network: nn.Module, device: str) -> None:
        super().__init__()
        self.network, self._device = network, device

    def forward(self, *given: Any) -> Any:
        with torch.autocast(self._device, torch.bfloat16):
            outputs = self.network(*given)
        return outputs.float() if isinstance(outputs, Tensor) else outputs


def half_precision_backbone(detector: nn.Module, device: str) -> None:
    """Have a detector's backbone alone reckon in bfloat16.

    Boxes in it would lie on multiples of 2 pixels from 256 on, of 4 from 512 on: thin ones are nothing, and their loss no number.
    """
    backbone: Any = detector.backbone
    whole = backbone.forward

    def forward(images: Tensor) -> Any:
        with torch.autocast(device, torch.bfloat16):
            found = whole(images)
        return found.float() if isinstance(found, Tensor) else OrderedDict((name, each.float()) for name, each in found.items())

    backbone.forward = forward


def on_gpu(network: nn.Module, *, compiled: bool, detector: bool = False) -> nn.Module:
    """The network as a GPU runs its training steps, with the same weights. Older ones only pretend to know bfloat16."""
    if not torch.cuda.is_bf16_supported(including_emulation=False):
        forward = network
    elif detector:
        half_precision_backbone(network, "cuda")
        forward = network
    else:
        forward = HalfPrecision(network, "cuda")
    if compiled:
        forward.compile()
    return forward


class Feed:
    """Batches of examples on a device, ready before the steps ask for them.

    `waited`: seconds in which a step had to wait for its batch; on a GPU, which works behind the steps, that is the most that it
    can have waited.
    """

    def __init__(self, examples: Examples, device: torch.device) -> None:
        self.waited = 0.0
        self._pixels, self._numbers, self._device = examples.mapped, examples.numbers, device
        self._resident: Tensor | None = None
        if device.type == "cuda" and examples.mapped.nbytes <= _RESIDENT * torch.cuda.mem_get_info(device)[0]:
            self._resident = torch.from_numpy(examples.mapped).to(device)

    def batches(self, numbers: Tensor) -> Iterator[Tensor]:
        """For each batch of numbers of examples, int64 `[batches, N]`, the images, uint8 `[N, height, width, channels]`."""
        if self._numbers is not None:
            numbers = torch.from_numpy(self._numbers)[numbers]
        if self._resident is not None:
            yield from (self._resident[batch.to(self._device, non_blocking=True)] for batch in numbers.unbind())
            return
        with ThreadPoolExecutor(1) as thread:
            left = iter(numbers.unbind())
            coming: deque[Future[Tensor]] = deque(thread.submit(self._gathered, batch) for batch in islice(left, _AHEAD))
            while coming:
                asked = time.perf_counter()
                images = coming.popleft().result()
                self.waited += time.perf_counter() - asked
                coming.extend(thread.submit(self._gathered, batch) for batch in islice(left, 1))
                yield images.to(self._device, non_blocking=True)

    def _gathered(self, batch: Tensor) -> Tensor:
        """By numpy: torch would start threads of its own for this one. From pinned memory a GPU fetches by itself."""
        images = torch.from_numpy(np.take(self._pixels, batch.numpy(), axis=0))
        return images.pin_memory() if self._device.type == "cuda" else images


class _Training:
    """The state of a training: weights, their average and the optimizer's memory."""

    def __init__(self, network: nn.Module, examples: Examples, config: ModelConfig, augment: Augment) -> None:
        self._config, self._hyperparameters, kind = config, config.hyperparameters, problem.of(config.problem_type)
        self._examples, self._loss = len(examples), kind.loss(examples.rows, config, augment)
        self._plain_loss = kind.loss(examples.rows, config, lambda *given: given if len(given) > 1 else given[0])
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.feed = Feed(examples, self._device)
        self.steps_an_epoch = max(math.ceil(len(examples) / self._hyperparameters.batch_size), _STEPS_AN_EPOCH)
        self._steps = self.steps_an_epoch * self._hyperparameters.epochs
        self._augmented = self._steps - math.ceil(_PLAIN_ROUNDS * len(examples) / self._hyperparameters.batch_size)
        # Images come with their channels last, and convolutions are faster when everything stays so.
        self._network = network.to(self._device).to(memory_format=torch.channels_last).train()
        decay = max(0.0, 1 - 1 / (_AVERAGED * self._steps))
        average = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]
        self._average = AveragedModel(self._network, multi_avg_fn=average).eval()
        self._optimizer = torch.optim.AdamW(
            self._network.parameters(), weight_decay=self._hyperparameters.weight_decay, fused=self._device.type == "cuda"
        )
        self._forward = self._network
        if self._device.type == "cuda":
            detector = config.problem_type == "detection"
            pays = self._steps >= _COMPILED_FROM and not detector and ranks.count() == 1
            self._forward = on_gpu(self._network, compiled=pays, detector=detector)
        else:
            torch.set_num_threads(threads(kind.heads(self._average.module), config))
        self._forward = ranks.together(self._forward)

    def batches(self, epoch: int) -> Tensor:
        """The epoch's batches as numbers of examples, `[steps, batch]`. All are full; a small set comes round several times."""
        size = self._hyperparameters.batch_size
        rounds = math.ceil(self.steps_an_epoch * size / self._examples)
        order = torch.cat([torch.randperm(self._examples, generator=self._generator(epoch)) for _ in range(rounds)])
        return order[: self.steps_an_epoch * size].view(self.steps_an_epoch, size)

    def step(self, step: int, batch: Tensor, images: Tensor) -> Tensor:
        """Learn from this rank's part of a batch of examples, and their images; returns its share of the loss.

        The mean of all ranks' is the batch's, however unequal their parts.
        """
        torch.manual_seed(self._seed(step * ranks.count() + ranks.rank()))
        for group in self._optimizer.param_groups:
            group["lr"] = self.learning_rate(step)
        share = len(batch) * ranks.count() / self._hyperparameters.batch_size
        of = self._loss if step < self._augmented else self._plain_loss
        loss = of(self._forward, to_network(images), batch) * share
        self._optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self._optimizer.step()
        self._average.update_parameters(self._network)
        return loss.detach()

    def averaged(self, epoch: int) -> nn.Module:
        """The network with the averaged weights and their own batch-norm statistics, in evaluation mode.

        Statistics gathered on the way belong to other weights. While these change fast, as from random ones, a deep network with
        them does no better than chance. So they are reckoned anew ("precise BN", Wu and Johnson 2021), from images as they serve.
        """
        network: nn.Module = self._average.module
        norms = [layer for layer in network.train().modules() if isinstance(layer, _BatchNorm) and layer.training]
        momenta = [layer.momentum for layer in norms]
        for layer in norms:
            layer.reset_running_stats()
            layer.momentum = None  # the mean over the batches
        if norms:
            torch.manual_seed(self._seed(epoch))
            batches = self.batches(epoch)[:_NORM_BATCHES]
            with torch.no_grad():
                for batch, images in zip(batches, self.feed.batches(batches), strict=True):
                    self._plain_loss(network, to_network(images), batch)
        for layer, momentum in zip(norms, momenta, strict=True):
            layer.momentum = momentum
        return network.eval()

    def learning_rate(self, step: int) -> float:
        """A short rise, then half a cosine down to nothing."""
        share = (step + 1) / self._steps
        return self._hyperparameters.learning_rate * min(1.0, share / _WARM_UP) * (1 + math.cos(math.pi * share)) / 2

    def save(self, file: Path, steps: int) -> None:
        """Whole or not at all: a machine may be taken away at any moment. All ranks' is the same, the first's is kept."""
        if ranks.rank() > 0:
            return
        unfinished = file.with_suffix(".new")
        torch.save(
            {"config": repr(self._config), "steps": steps, **{key: part.state_dict() for key, part in self._parts.items()}},
            unfinished,
        )
        unfinished.replace(file)

    def resume(self, file: Path) -> int:
        """Take up a checkpoint where there is one; returns the steps already done. One that is of no use is said so and left."""
        if not file.is_file():
            return 0
        try:
            state = torch.load(file, map_location=self._device, weights_only=True)
        except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
            log.warning("the checkpoint cannot be read, training starts anew: %s", error)
            return 0
        if not isinstance(state, dict) or state.get("config") != repr(self._config):
            log.warning("the checkpoint belongs to another training, this one starts anew")
            return 0
        for key, part in self._parts.items():
            part.load_state_dict(state[key])
        log.info("going on from the checkpoint at step %d of %d", state["steps"], self._steps)
        return int(state["steps"])

    @property
    def _parts(self) -> dict[str, nn.Module | torch.optim.Optimizer]:
        return {"network": self._network, "average": self._average, "optimizer": self._optimizer}

    def _seed(self, number: int) -> int:
        return (self._hyperparameters.seed * 1_000_003 + number) % 2**63

    def _generator(self, epoch: int) -> torch.Generator:
        return torch.Generator().manual_seed(self._seed(epoch))
