"""Batches of a dataset: shuffled anew in each epoch, the same samples in the same order whatever ranks there are, resumable.

    epoch 0   17 4 | 9 0 | 2 11 | …      batch k of an epoch is a run of a permutation that seed and epoch alone decide;
    rank 0    17   | 9   | 2    | …      a rank reads its samples of it and no others
    rank 1       4 |   0 |   11 | …

A stream (a dataset without numbers) has its own order: every rank goes through it and keeps its samples of each batch. torchdata's
StatefulDataLoader reads, in worker processes where they are asked for, and knows where each of them is in its stream. The state is the
place after the last batch that was handed out: what was read ahead is read again.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from itertools import islice
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import Dataset as TorchDataset
from torch.utils.data import IterableDataset, Sampler, default_collate
from torchdata.stateful_dataloader import Stateful, StatefulDataLoader

from shardwise._torch import worker_of_stream
from shardwise.data.draws import key_of, own_draws, seed_draws
from shardwise.errors import DataError

__all__ = ["Loader", "has_numbers"]

Collate = Callable[[list[Any]], Any]


def has_numbers(dataset: Any) -> bool:
    """Whether samples can be read in any order; a stream's cannot."""
    return not isinstance(dataset, IterableDataset) and hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")


class Loader:
    """An iterator over one epoch at a time: `for batch in loader` goes through what is left of the present one, then the next begins.

    dataset: any with __len__ and __getitem__, or a stream, any with __iter__. batch_size: samples in a global batch, over all ranks.
    part: this rank's samples of each batch (`job.batch_slice`, with job.step(batch, local=True)); None: all of them, as on one device.
    shuffle: by default where samples have numbers; a stream shuffles itself. A dataset's `set_epoch`, if there is one, is called with each.
    drop_last: an incomplete batch at the end of an epoch is left out, as training needs it. job.eval takes incomplete ones: of those a rank
    reads the same share, possibly nothing (tensors without samples).
    workers: processes that read ahead; 0: batches are read when they are asked for. ahead: batches that each worker reads before that.
    A stream is divided over several workers by itself (`torch.utils.data.get_worker_info`), as torch asks for.
    collate: list of samples → batch, torch's by default.

    What a sample with a number draws from the generators of torch, numpy and Python follows from seed, epoch and number; what a stream
    draws while a batch is read, from seed, epoch, worker and batch. A generator of the dataset's own is its own affair.
    Raises DataError for what is neither kind of dataset, for fewer samples than a batch, and for a stream that workers would repeat.
    """

    def __init__(
        self,
        dataset: TorchDataset[Any] | Sequence[Any] | Iterable[Any],
        batch_size: int,
        *,
        part: slice | None = None,
        shuffle: bool | None = None,
        seed: int = 0,
        drop_last: bool = True,
        workers: int = 0,
        ahead: int = 2,
        collate: Collate | None = None,
    ) -> None:
        self.dataset = cast(Any, dataset)
        self.numbered = has_numbers(dataset)
        if not self.numbered and not hasattr(dataset, "__iter__"):
            raise DataError(
                f"{type(dataset).__name__} has no samples to read: neither __len__ and __getitem__ nor __iter__; give it either"
            )
        if shuffle and not self.numbered:
            raise DataError(
                f"{type(dataset).__name__} is a stream, whose order is its own: shuffle in its __iter__ and leave out shuffle=True"
            )
        if batch_size < 1 or workers < 0 or ahead < 1:
            raise DataError(f"batch_size={batch_size}, workers={workers}, ahead={ahead}: at least 1, 0 and 1 are needed")
        self.batch_size, self.seed, self.drop_last = batch_size, seed, drop_last
        self.shuffle = self.numbered if shuffle is None else shuffle
        self.part = part or slice(0, batch_size)
        self.workers, self.ahead, self.collate = workers, ahead, collate or default_collate
        self.epoch = self.batch = 0
        self._reader: StatefulDataLoader[Any] | None = None
        self._place: dict[str, Any] | None = None  # of a stream whose epoch has begun
        if self.numbered and not len(self):
            raise DataError(
                f"the dataset has {len(self.dataset)} samples, fewer than a batch of {batch_size}: take more data or a smaller batch"
            )

    def __len__(self) -> int:
        """Batches in an epoch. Raises TypeError for a stream."""
        full, rest = divmod(len(self.dataset), self.batch_size)
        return full + (rest > 0 and not self.drop_last)

    def __iter__(self) -> Generator[Any, None, None]:
        if self.numbered and self.batch >= len(self):
            self._next_epoch()
        self._reader = self._made_reader()
        try:
            for batch in self._reader:
                self.batch += 1
                yield batch
        finally:
            self._place, self._reader = self._place_in_stream(), None
        if not self.batch:
            raise DataError(
                f"the stream {type(self.dataset).__name__} gave fewer samples in epoch {self.epoch} than a batch of {self.batch_size}"
            )
        self._next_epoch()

    def _next_epoch(self) -> None:
        self.epoch, self.batch, self._place = self.epoch + 1, 0, None

    def forever(self) -> Generator[Any, None, None]:
        """Epoch after epoch."""
        while True:
            yield from self

    # -- state -----------------------------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The place after the last batch that was handed out, the same on every rank: plain numbers, and what a stream says of itself."""
        return {"epoch": self.epoch, "batch": self.batch, **self._order(), "stream": self._place_in_stream()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The next batch will be the one that would have come next. Raises DataError where the order was another."""
        for name, value in self._order().items():
            if state.get(name) != value:
                raise DataError(
                    f"the loader's state was taken with {name}={state.get(name)}, here {name}={value}: the samples would "
                    "come in another order"
                )
        self.epoch, self.batch, self._place = int(state["epoch"]), int(state["batch"]), state.get("stream")

    def _order(self) -> dict[str, Any]:
        """What the order of the samples follows from."""
        return {
            "samples": len(self.dataset) if self.numbered else None,
            "batch_size": self.batch_size,
            "shuffle": self.shuffle,
            "seed": self.seed,
            "drop_last": self.drop_last,
            **({} if self.numbered else {"workers": self.workers}),
        }

    def _place_in_stream(self) -> dict[str, Any] | None:
        if self.numbered or self._reader is None:
            return self._place
        return self._reader.state_dict()

    # -- reading ---------------------------------------------------------------------------------------------------------------------------

    def _made_reader(self) -> StatefulDataLoader[Any]:
        """Of what is left of the epoch."""
        how: dict[str, Any] = {
            "num_workers": self.workers,
            "prefetch_factor": self.ahead if self.workers else None,
            "collate_fn": _Join(self.collate),
            "generator": torch.Generator(),  # else workers' seeds would be drawn from the model's
        }
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(self.epoch)
        if self.numbered:
            samples = _Samples(self.dataset, key_of(self.seed, self.epoch))
            return _reader(samples, batch_sampler=_Batches(self._left()), **how)
        reader = _reader(_Stream(self), batch_size=None, **how)
        if self._place is not None:
            reader.load_state_dict(self._place)
        return reader

    def _left(self) -> list[list[int]]:
        """This rank's samples of each batch that is left of the epoch; of one it has none of, the first sample, marked by -1."""
        count = len(self.dataset)
        if self.shuffle:
            order = torch.randperm(count, generator=torch.Generator().manual_seed(key_of(self.seed, self.epoch)))
        else:
            order = torch.arange(count)
        found = []
        for batch in range(self.batch, len(self)):
            whole = order[batch * self.batch_size : (batch + 1) * self.batch_size]
            found.append(whole[self.share(len(whole))].tolist() or [-1, int(whole[0])])
        return found

    def share(self, samples: int) -> slice:
        """This rank's part of a batch of so many."""
        return slice(*(edge * samples // self.batch_size for edge in (self.part.start, self.part.stop)))


def _reader(dataset: Any, **how: Any) -> StatefulDataLoader[Any]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "'set_vital' is deprecated")  # torchdata calls it
        return StatefulDataLoader(dataset, **how)


class _Samples(TorchDataset[Any]):
    """The dataset's samples; None for the mark of a batch without any."""

    def __init__(self, dataset: Any, key: int) -> None:
        self.dataset, self.key = dataset, key

    def __getitems__(self, indices: list[int]) -> list[Any]:
        with own_draws():
            return [self._sample(index) for index in indices]

    def _sample(self, index: int) -> Any:
        if index < 0:
            return None
        seed_draws(key_of(self.key, index))
        return self.dataset[index]


class _Batches(Sampler[list[int]]):
    def __init__(self, batches: list[list[int]]) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.batches)


class _Stream(IterableDataset[Any]):
    """This rank's samples of each batch of a stream, as `_Batches` marks one that it has none of."""

    def __init__(self, loader: Loader) -> None:
        self.dataset, self.size, self.share = loader.dataset, loader.batch_size, loader.share
        self.drop_last, self.key = loader.drop_last, key_of(loader.seed, loader.epoch)

    def __iter__(self) -> _Place:
        return _Place(self)


class _Place:
    """A place in a stream that says where it is (`state_dict`, of the dataset or of its iterator), or else is found again by reading."""

    def __init__(self, stream: _Stream) -> None:
        self.stream, self.batches = stream, 0
        self.worker, self.is_divided = worker_of_stream()
        self._begin()

    def __iter__(self) -> _Place:
        return self

    def __next__(self) -> list[Any]:
        whole = self._read()
        if not whole or (self.stream.drop_last and len(whole) < self.stream.size):
            raise StopIteration
        if not self.is_divided():
            raise DataError(
                f"each of several workers would read all of {type(self.stream.dataset).__name__}, which does not ask which worker it "
                "is in: have its __iter__ take a part of the samples by torch.utils.data.get_worker_info(), or take workers=1"
            )
        return whole[self.stream.share(len(whole))] or [None, whole[0]]

    def _begin(self) -> None:
        with own_draws():
            seed_draws(key_of(self.stream.key, self.worker))
            self.source = iter(self.stream.dataset)

    def _read(self) -> list[Any]:
        """A whole batch."""
        with own_draws():
            seed_draws(key_of(self.stream.key, self.worker, self.batches))
            self.batches += 1
            return list(islice(self.source, self.stream.size))

    def state_dict(self) -> dict[str, Any]:
        known = {"dataset": self.stream.dataset, "iterator": self.source}
        return {
            "batches": self.batches,
            **{name: deepcopy(each.state_dict()) for name, each in known.items() if isinstance(each, Stateful)},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if "dataset" in state:
            self.stream.dataset.load_state_dict(state["dataset"])
            self._begin()
        if "iterator" in state:
            self.source.load_state_dict(state["iterator"])
        if len(state) == 1:
            while self.batches < state["batches"]:
                self._read()
        self.batches = state["batches"]


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
