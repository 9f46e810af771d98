"""Batches of images where the steps of a training want them, ready before they are asked for."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from training_jobs.dataset import Pixels

_RESIDENT = 0.25  # share of a GPU's free memory that the images may take, so that no batch has to travel
_AHEAD = 2  # batches that are gathered before the step that wants them


class Feed:
    """Batches on a device. `waited`: seconds in which a step had to wait for its batch; on a GPU, which works behind the steps,
    that is the most that it can have waited."""

    def __init__(self, pixels: Pixels, device: torch.device) -> None:
        self.waited = 0.0
        self._pixels, self._device = pixels, device
        self._resident: Tensor | None = None
        if device.type == "cuda" and pixels.nbytes <= _RESIDENT * torch.cuda.mem_get_info(device)[0]:
            self._resident = torch.from_numpy(pixels).to(device)

    def batches(self, numbers: Tensor) -> Iterator[Tensor]:
        """For each batch of numbers, int64 `[batches, N]`, the images, uint8 `[N, height, width, channels]`."""
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
