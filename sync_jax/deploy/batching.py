"""Pictures of several requests computed together, within limits."""

import asyncio
import contextlib
import dataclasses
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from sync_jax.deploy.stream import Classifier


@dataclasses.dataclass(frozen=True)
class Limits:
    """Limits of requests and of the queue."""

    bytes: int = 20_000_000  # of a request
    images: int = 64  # of a request
    pixels: int = 50_000_000  # of a picture
    seconds: float = 30.0  # until a request is answered
    waiting: int = 512  # pictures in the queue; more are refused with 503
    batch: int = 32  # pictures computed together
    delay: float = 0.004  # seconds that a picture waits for others


class ProblemError(Exception):
    """An error that the client is told."""

    def __init__(self, status: int, detail: str):
        """Takes the HTTP status and a line for the client."""
        super().__init__(detail)
        self.status, self.detail = status, detail


class Batcher:
    """Computes pictures of several requests together, in one thread."""

    def __init__(self, classifier: Classifier, limits: Limits):
        """Takes the classifier that computes."""
        self._classifier, self._limits = classifier, limits
        self._queue: asyncio.Queue[tuple[np.ndarray, asyncio.Future[tuple[Any, ...]]]] = (
            asyncio.Queue(limits.waiting)
        )
        self._thread = ThreadPoolExecutor(1, "predict")

    @property
    def waiting(self) -> int:
        """Pictures in the queue."""
        return self._queue.qsize()

    async def predict(self, images: Sequence[np.ndarray]) -> list[tuple[Any, ...]]:
        """Answers for pictures, each a row of a `Prediction`."""
        loop, futures = asyncio.get_running_loop(), []
        if self._queue.qsize() + len(images) > self._limits.waiting:
            raise ProblemError(503, "too many pictures are waiting; try again")
        for image in images:
            future: asyncio.Future[tuple[Any, ...]] = loop.create_future()
            self._queue.put_nowait((image, future))
            futures.append(future)
        return list(await asyncio.gather(*futures))

    async def run(self) -> None:
        """Works until it is cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            batch = [await self._queue.get()]
            deadline = loop.time() + self._limits.delay
            while len(batch) < self._limits.batch:
                with contextlib.suppress(asyncio.QueueEmpty):
                    batch.append(self._queue.get_nowait())
                    continue
                left = deadline - loop.time()
                if left <= 0:
                    break
                try:
                    batch.append(await asyncio.wait_for(self._queue.get(), left))
                except TimeoutError:
                    break
            wanted = [entry for entry in batch if not entry[1].done()]  # whose client still waits
            if not wanted:
                continue
            try:
                found = await loop.run_in_executor(
                    self._thread, self._classifier.predict, np.stack([x for x, _ in wanted])
                )
            except Exception as error:  # the client is told, and the next ones are served
                for _, future in wanted:
                    if not future.done():
                        future.set_exception(error)
                continue
            rows = zip(*map(np.asarray, found), strict=True)
            for row, (_, future) in zip(rows, wanted, strict=True):
                if not future.done():
                    future.set_result(row)
