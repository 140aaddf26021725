"""Batches of a dataset: shuffled anew in each epoch, the same samples in the same order whatever ranks there are, resumable.

    epoch 0   17 4 | 9 0 | 2 11 | …      batch k of an epoch is a run of a permutation that seed and epoch alone decide;
    rank 0    17   | 9   | 2    | …      a rank reads its samples of it and no others
    rank 1       4 |   0 |   11 | …

The state is the place in that order after the last batch that was handed out: what was read ahead is read again.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, Sampler, default_collate
from torch.utils.data import Dataset as TorchDataset

from shardwise.errors import DataError

__all__ = ["Loader"]

Collate = Callable[[list[Any]], Any]
_LARGEST = 2**63 - 1


class Dataset(Protocol):
    """Samples by number."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Any: ...


class Loader:
    """An iterator over one epoch at a time: `for batch in loader` goes through what is left of the present one, then the next begins.

    dataset: any with __len__ and __getitem__. batch_size: samples in a global batch, over all ranks.
    part: this rank's samples of each batch (`job.batch_slice`, with job.step(batch, local=True)); None: all of them, as on one device.
    drop_last: an incomplete batch at the end of an epoch is left out, as training needs it. job.eval takes incomplete ones: of those a rank
    reads the same share, possibly nothing (tensors without samples).
    workers: processes that read; 0: a thread reads. ahead: batches that are read (by each process) before they are asked for.
    collate: list of samples → batch, torch's by default.
    Raises DataError for a dataset without numbered samples, or with fewer than a batch.
    """

    def __init__(
        self,
        dataset: TorchDataset[Any] | Sequence[Any],
        batch_size: int,
        *,
        part: slice | None = None,
        shuffle: bool = True,
        seed: int = 0,
        drop_last: bool = True,
        workers: int = 0,
        ahead: int = 2,
        collate: Collate | None = None,
    ) -> None:
        if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
            raise DataError(
                f"{type(dataset).__name__} has no numbered samples (__len__ and __getitem__), so ranks cannot read their own "
                "parts of it and a run could not go on where it stopped; give a dataset that has them"
            )
        if batch_size < 1 or workers < 0 or ahead < 1:
            raise DataError(f"batch_size={batch_size}, workers={workers}, ahead={ahead}: at least 1, 0 and 1 are needed")
        self.dataset: Any = dataset
        self.batch_size, self.shuffle, self.seed, self.drop_last = batch_size, shuffle, seed, drop_last
        self.part = part or slice(0, batch_size)
        self.workers, self.ahead, self.collate = workers, ahead, collate or default_collate
        self.epoch = self.batch = 0
        if not len(self):
            raise DataError(
                f"the dataset has {len(self.dataset)} samples, fewer than a batch of {batch_size}: take more data or a smaller batch"
            )

    def __len__(self) -> int:
        """Batches in an epoch."""
        full, rest = divmod(len(self.dataset), self.batch_size)
        return full + (rest > 0 and not self.drop_last)

    def __iter__(self) -> Generator[Any, None, None]:
        if self.batch >= len(self):
            self.epoch, self.batch = self.epoch + 1, 0
        read = self._by_processes() if self.workers else self._by_thread()
        try:
            for batch in read:
                self.batch += 1
                yield batch
        finally:
            read.close()
        self.epoch, self.batch = self.epoch + 1, 0

    def forever(self) -> Generator[Any, None, None]:
        """Epoch after epoch."""
        while True:
            yield from self

    # -- state -----------------------------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The place after the last batch that was handed out; plain numbers, the same on every rank."""
        return {"epoch": self.epoch, "batch": self.batch, **self._order()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The next batch will be the one that would have come next. Raises DataError where the order was another."""
        for name, value in self._order().items():
            if state.get(name) != value:
                raise DataError(
                    f"the loader's state was taken with {name}={state.get(name)}, here {name}={value}: the samples would "
                    "come in another order"
                )
        self.epoch, self.batch = int(state["epoch"]), int(state["batch"])

    def _order(self) -> dict[str, Any]:
        """What the order of the samples follows from."""
        return {
            "samples": len(self.dataset),
            "batch_size": self.batch_size,
            "shuffle": self.shuffle,
            "seed": self.seed,
            "drop_last": self.drop_last,
        }

    # -- reading ---------------------------------------------------------------------------------------------------------------------------

    def _left(self) -> list[list[int]]:
        """This rank's samples of each batch that is left of the epoch; of one it has none of, the first sample, marked by -1."""
        count = len(self.dataset)
        if self.shuffle:
            order = torch.randperm(count, generator=torch.Generator().manual_seed(_mixed(self.seed, self.epoch)))
        else:
            order = torch.arange(count)
        found = []
        for batch in range(self.batch, len(self)):
            whole = order[batch * self.batch_size : (batch + 1) * self.batch_size]
            start, stop = (edge * len(whole) // self.batch_size for edge in (self.part.start, self.part.stop))
            found.append(whole[start:stop].tolist() or [-1, int(whole[0])])
        return found

    def _by_processes(self) -> Generator[Any, None, None]:
        batches = _Batches(self._left())
        loader = DataLoader(
            _Samples(self.dataset),
            batch_sampler=batches,
            num_workers=self.workers,
            prefetch_factor=self.ahead,
            collate_fn=_Join(self.collate),
        )
        yield from loader

    def _by_thread(self) -> Generator[Any, None, None]:
        """A thread reads while the caller computes."""
        ready: queue.Queue[tuple[Any, BaseException | None]] = queue.Queue(maxsize=self.ahead)
        ended = threading.Event()
        join, samples = _Join(self.collate), _Samples(self.dataset)
        left = self._left()

        def put(item: tuple[Any, BaseException | None]) -> None:
            while not ended.is_set():
                with suppress(queue.Full):
                    ready.put(item, timeout=0.1)
                    return

        def read() -> None:
            try:
                for indices in left:
                    put((join([samples[index] for index in indices]), None))
                    if ended.is_set():
                        return
            except BaseException as error:
                put((None, error))

        reader = threading.Thread(target=read, name="reads samples", daemon=True)
        reader.start()
        try:
            for _ in left:
                batch, error = ready.get()
                if error is not None:
                    raise error
                yield batch
        finally:
            ended.set()
            reader.join()


def _mixed(seed: int, epoch: int) -> int:
    """Seed of an epoch's order (constants: splitmix64)."""
    return ((seed + 1) * 0x9E3779B97F4A7C15 + (epoch + 1) * 0xBF58476D1CE4E5B9) & _LARGEST


class _Samples(TorchDataset[Any]):
    """The dataset's samples; None for the mark of a batch without any."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    def __getitem__(self, index: int) -> Any:
        return None if index < 0 else self.dataset[index]


class _Batches(Sampler[list[int]]):
    def __init__(self, batches: list[list[int]]) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.batches)


class _Join:
    """Samples → batch; after a mark, one without samples like that of the sample behind it."""

    def __init__(self, collate: Collate) -> None:
        self.collate = collate

    def __call__(self, samples: list[Any]) -> Any:
        if samples[0] is None:
            return _emptied(self.collate(samples[1:]))
        return self.collate(samples)


def _emptied(batch: Any) -> Any:
    if isinstance(batch, Tensor):
        return batch[:0]
    if isinstance(batch, Mapping):
        return {name: _emptied(value) for name, value in batch.items()}
    return type(batch)(_emptied(value) for value in batch) if isinstance(batch, (list, tuple)) else batch
