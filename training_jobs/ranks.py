"""Several GPUs of one machine: torchrun (start.sh) runs a process for each, a rank, and they train one network together.

The first rank does the job. What it trains it shares with the others, who do nothing else than train along: each learns from its
part of every batch, and the mean of all gradients is everyone's. A process alone is the first of one.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from labelloop.errors import LabelloopError, SettingsError
from labelloop.model_config import ModelConfig
from labelloop.records import ModelCard
from labelloop.settings import Settings
from training_jobs.dataset import Examples, Pixels, demand_room

# The first rank decodes, exports and measures while the others wait. One that ends is noticed at once, by its connections.
_PATIENCE = timedelta(days=5)
_known: list[Pixels] = []  # the images that the others have mapped, as the out-of-fold models of a training learn from the same


def rank() -> int:
    return distributed.get_rank() if distributed.is_initialized() else 0


def count() -> int:
    return distributed.get_world_size() if distributed.is_initialized() else 1


def check_gpu(settings: Settings) -> None:
    """Raises `SettingsError` where torch cannot use the machine's GPU: its CPU would take long, at the same price."""
    if settings.gpu_driver and not torch.cuda.is_available():
        raise SettingsError(
            f"torch {torch.__version__} cannot use the machine's GPU with its driver {settings.gpu_driver}; "
            "name another training.instance_type"
        )


@contextmanager
def joined(settings: Settings) -> Iterator[None]:
    """In the block, the ranks that torchrun started know of each other; the others' `shared` ends with the first's block."""
    if settings.ranks == 1:
        yield
        return
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(settings.rank)
        backend = "cpu:gloo,cuda:nccl"
    distributed.init_process_group(
        backend,
        init_method=f"file://{settings.ranks_file}",  # torch's default listens on every interface
        rank=settings.rank,
        world_size=settings.ranks,
        timeout=_PATIENCE,
    )
    yield
    if rank() == 0:
        _broadcast(None)
    distributed.destroy_process_group()


class Shared(NamedTuple):
    """What a fit goes by, except for what model.py makes."""

    train: Examples
    config: ModelConfig
    card: ModelCard
    checkpoint: Path


def share(fit: Shared) -> None:
    """Have the others train along; nothing for one of them, or alone. Raises `StorageError` where the disk is too full."""
    if count() == 1 or rank() > 0:
        return
    told = fit._replace(train=replace(fit.train, mapped=fit.train.mapped[:0]))
    if any(fit.train.mapped is known for known in _known):
        _broadcast((told, None))
        return
    demand_room(fit.train.mapped.nbytes, Path(tempfile.gettempdir()), "training images, a copy for the other GPUs, take")
    with tempfile.NamedTemporaryFile(suffix=".npy") as file:
        np.save(file, fit.train.mapped)
        file.flush()
        _broadcast((told, Path(file.name)))
        any_of(flag=False)  # everyone has opened it
    _known[:] = [fit.train.mapped]


def shared() -> Iterator[Shared]:
    """What the first rank trains, one after the other, until its job is done."""
    pixels: Pixels = np.empty(0, np.uint8)
    while (sent := _broadcast(None)) is not None:
        fit, file = sent
        if file:
            pixels = np.load(file, mmap_mode="r")
            any_of(flag=False)
        yield fit._replace(train=replace(fit.train, mapped=pixels))


def part(batches: Tensor) -> Tensor:
    """This rank's part of each batch, `[batches, N]` → `[batches, about N / count]`."""
    return batches[:, rank() :: count()]


def together(network: nn.Module) -> nn.Module:
    """The network with the first rank's weights, whose backward pass leaves the mean of everyone's gradients.

    On GPUs batch normalisation sees whole batches, as one GPU would.
    """
    if count() == 1:
        return network
    devices = None
    if torch.cuda.is_available():
        network = nn.SyncBatchNorm.convert_sync_batchnorm(network)  # type: ignore[no-untyped-call]
        devices = [torch.cuda.current_device()]
    return DistributedDataParallel(network, device_ids=devices, find_unused_parameters=True)


def mean(value: Tensor) -> float:
    """Of everyone's value."""
    if count() == 1:
        return float(value)
    whole = value.detach().cpu()
    with _company():
        distributed.all_reduce(whole)
    return float(whole) / count()


def any_of(*, flag: bool) -> bool:
    """Whether anyone's flag is set; everyone gets the same answer, and waits for it."""
    if count() == 1:
        return flag
    flags = torch.tensor(int(flag))
    with _company():
        distributed.all_reduce(flags)
    return bool(flags)


def _broadcast(sent: tuple[Shared, Path | None] | None) -> tuple[Shared, Path | None] | None:
    """The first rank's: a fit without its pixels, which may be larger than memory, and the file that everyone maps them from.

    Without a file they are those of before.
    """
    box = [sent]
    with _company():
        distributed.broadcast_object_list(box, src=0, device=torch.device("cpu"))
    return box[0]


@contextmanager
def _company() -> Iterator[None]:
    """Raises `LabelloopError` when another rank has ended."""
    try:
        yield
    except RuntimeError as error:
        raise LabelloopError(
            f"one of the {count()} processes that train together, one for each GPU, has ended; the job's log says why ({error})"
        ) from error
