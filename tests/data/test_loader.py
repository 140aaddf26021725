"""The order in which ranks read samples, and going on where a run stopped."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator
from itertools import chain
from multiprocessing import Value
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from shardwise.data import Loader
from shardwise.errors import DataError


class Numbers:
    """Sample i is i; which were read is noted."""

    def __init__(self, count: int) -> None:
        self.count, self.read = count, list[int]()

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if index == 13 and self.count == 99:
            raise ValueError("sample 13 is broken")
        self.read.append(index)
        return {"x": torch.tensor(index)}


def numbers(batch: dict[str, Tensor]) -> list[int]:
    return batch["x"].tolist()


def epochs(loader: Loader, count: int) -> list[list[list[int]]]:
    return [[numbers(batch) for batch in loader] for _ in range(count)]


PARTS = {"alike": [slice(0, 2), slice(2, 4), slice(4, 6)], "shares 1:3:2": [slice(0, 1), slice(1, 4), slice(4, 6)]}


@pytest.mark.parametrize("parts", PARTS.values(), ids=PARTS)
@pytest.mark.parametrize("shuffle", [True, False])
def test_ranks_read_their_parts_of_one_devices_batches_and_no_others(parts: list[slice], shuffle: bool) -> None:
    alone = epochs(Loader(Numbers(20), 6, shuffle=shuffle, seed=3), 3)
    data = [Numbers(20) for _ in parts]
    ranks = [epochs(Loader(each, 6, part=part, shuffle=shuffle, seed=3), 3) for each, part in zip(data, parts, strict=True)]
    for epoch in range(3):
        assert len(alone[epoch]) == 3, "20 samples are 3 batches of 6"
        assert [list(chain(*(rank[epoch][k] for rank in ranks))) for k in range(3)] == alone[epoch]
    assert sorted(n for each in data for n in each.read) == sorted(n for epoch in alone for batch in epoch for n in batch)


def test_epochs_are_shuffled_by_seed_and_number() -> None:
    first, second = epochs(Loader(Numbers(24), 6, seed=1), 2)
    assert sorted(chain(*first)) == sorted(chain(*second)) == list(range(24)) and first != second
    assert epochs(Loader(Numbers(24), 6, seed=1), 2) == [first, second]
    assert epochs(Loader(Numbers(24), 6, seed=2), 2) != [first, second]
    assert epochs(Loader(Numbers(7), 3, shuffle=False, drop_last=False), 1) == [[[0, 1, 2], [3, 4, 5], [6]]]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("taken", [0, 1, 3, 4, 5, 11])
def test_a_run_goes_on_with_the_same_next_batch(taken: int, workers: int) -> None:
    """Whatever was read ahead; 4 batches an epoch."""
    whole = [numbers(batch) for _, batch in zip(range(14), Loader(Numbers(25), 6, seed=5).forever(), strict=False)]
    stopped = Loader(Numbers(25), 6, seed=5, workers=workers)
    batches = stopped.forever()
    before = [numbers(next(batches)) for _ in range(taken)]
    state = stopped.state_dict()
    batches.close()
    resumed = Loader(Numbers(25), 6, seed=5, workers=workers)
    resumed.load_state_dict(state)
    after = [numbers(batch) for _, batch in zip(range(14 - taken), resumed.forever(), strict=False)]
    assert before + after == whole


def test_leaving_an_epoch_early_and_coming_back() -> None:
    loader = Loader(Numbers(12), 3, shuffle=False)
    assert numbers(next(iter(loader))) == [0, 1, 2]
    assert [numbers(batch) for batch in loader] == [[3, 4, 5], [6, 7, 8], [9, 10, 11]]
    assert loader.epoch == 1


class Counted(Numbers):
    """Counts what other processes read, too."""

    def __init__(self, count: int) -> None:
        super().__init__(count)
        self.all = Value("i", 0)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        with self.all.get_lock():
            self.all.value += 1
        return super().__getitem__(index)


def test_workers_read_ahead() -> None:
    data = Counted(40)
    batches = iter(Loader(data, 4, workers=1, ahead=3))
    next(batches)
    deadline = time.monotonic() + 20
    while data.all.value < 4 * 4 and time.monotonic() < deadline:  # the one that was taken, and 3 that wait
        time.sleep(0.005)
    time.sleep(0.1)
    assert data.all.value == 4 * 4 and not data.read
    batches.close()


def test_incomplete_batches_are_shared_too() -> None:
    parts = PARTS["alike"]
    for count in range(1, 12):
        ranks = [epochs(Loader(Numbers(count), 6, part=part, shuffle=False, drop_last=False), 1)[0] for part in parts]
        assert list(chain(*(rank[k] for k in range(len(ranks[0])) for rank in ranks))) == list(range(count))
    empty = list(Loader(Numbers(1), 6, part=parts[0], drop_last=False))
    assert empty[0]["x"].shape == (0,) and empty[0]["x"].dtype == torch.int64


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_samples_error_is_the_loops(workers: int) -> None:
    with pytest.raises(ValueError, match="sample 13 is broken"):
        list(Loader(Numbers(99), 9, workers=workers))


class Drawing(Numbers):
    """What is drawn for a sample, as augmentations draw it."""

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"x": torch.stack([torch.rand(()), torch.tensor(np.random.rand()), torch.tensor(random.random())]).double()}


def test_what_samples_draw_follows_from_seed_epoch_and_number() -> None:
    """Whatever ranks and workers there are and wherever the run begins; and the model's own draws stay as they are."""
    torch.manual_seed(4)
    alone = [batch["x"] for _, batch in zip(range(7), Loader(Drawing(12), 4, seed=3).forever(), strict=False)]  # 3 batches an epoch
    after = torch.rand(5)
    torch.manual_seed(4)
    assert torch.equal(torch.rand(5), after)
    assert len({tuple(row.tolist()) for batch in alone for row in batch}) == 7 * 4, "another epoch, other draws"
    for workers in (0, 2):
        for part in (slice(0, 3), slice(3, 4)):
            loader = Loader(Drawing(12), 4, seed=3, part=part, workers=workers)
            loader.load_state_dict(Loader(Drawing(12), 4, seed=3).state_dict() | {"epoch": 1, "batch": 2})
            found = [batch["x"] for _, batch in zip(range(2), loader.forever(), strict=False)]
            assert all(torch.equal(one, other[part]) for one, other in zip(found, alone[5:], strict=True))


class Plain(IterableDataset[Any]):
    """From each epoch's number on, shuffled by what it draws from torch; it can only be read from the start."""

    def __init__(self, count: int = 53) -> None:
        self.count, self.epoch = count, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def own(self) -> list[int]:
        info = get_worker_info()
        own = torch.arange(self.epoch * 100, self.epoch * 100 + self.count)[info.id if info else 0 :: info.num_workers if info else 1]
        return own.tolist()

    def __iter__(self) -> Iterator[Any]:
        own = self.own()
        while own:
            yield {"x": torch.tensor(own.pop(int(torch.randint(min(5, len(own)), ()))))}


class Known(Plain):
    """The dataset knows its place."""

    def __init__(self, count: int = 53) -> None:
        super().__init__(count)
        self.place = {"read": 0}

    def __iter__(self) -> Iterator[Any]:
        for number in self.own()[self.place["read"] :]:
            self.place["read"] += 1
            yield {"x": torch.tensor(number)}
        self.place["read"] = 0

    def state_dict(self) -> dict[str, Any]:
        return self.place

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.place = dict(state)


class Walk:
    def __init__(self, numbers: list[int]) -> None:
        self.numbers, self.at = numbers, {"place": 0}

    def __iter__(self) -> Walk:
        return self

    def __next__(self) -> Any:
        if self.at["place"] == len(self.numbers):
            raise StopIteration
        self.at["place"] += 1
        return {"x": torch.tensor(self.numbers[self.at["place"] - 1])}

    def state_dict(self) -> dict[str, Any]:
        return self.at

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.at = dict(state)


class Walked(Plain):
    """Its iterator knows the place."""

    def __iter__(self) -> Walk:
        return Walk(self.own())


STREAMS = [Plain, Known, Walked]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("stream", STREAMS)
def test_a_stream_goes_on_where_it_was(stream: Any, workers: int) -> None:
    """53 numbers by 6 are 8 batches; of two workers 27 and 26 numbers, 4 batches each."""
    whole = [numbers(batch) for _, batch in zip(range(11), Loader(stream(), 6, workers=workers).forever(), strict=False)]
    assert len(set(chain(*whole[:8]))) == 48 and max(chain(*whole[:8])) < 53 <= 100 <= min(chain(*whole[8:]))
    for taken in (0, 1, 3, 8, 9):
        stopped = Loader(stream(), 6, workers=workers)
        batches = stopped.forever()
        before = [numbers(next(batches)) for _ in range(taken)]
        state = json.loads(json.dumps(stopped.state_dict()))
        batches.close()
        assert json.loads(json.dumps(stopped.state_dict())) == state, "closing changes nothing"
        resumed = Loader(stream(), 6, workers=workers)
        resumed.load_state_dict(state)
        after = [numbers(batch) for _, batch in zip(range(11 - taken), resumed.forever(), strict=False)]
        assert before + after == whole, taken


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("drop_last", [True, False])
def test_ranks_read_their_parts_of_a_streams_batches(workers: int, drop_last: bool) -> None:
    alone = epochs(Loader(Plain(), 6, workers=workers, drop_last=drop_last), 2)
    for parts in PARTS.values():
        ranks = [epochs(Loader(Plain(), 6, part=part, workers=workers, drop_last=drop_last), 2) for part in parts]
        for epoch in range(2):
            assert [list(chain(*each)) for each in zip(*(rank[epoch] for rank in ranks), strict=True)] == alone[epoch]
    assert sum(len(batch) for batch in alone[0]) == (48 if drop_last else 53)


def test_a_streams_place_is_of_so_many_workers() -> None:
    with pytest.raises(DataError, match="workers=0, here workers=1"):
        Loader(Plain(), 6, workers=1).load_state_dict(Loader(Plain(), 6).state_dict())


class Same(Plain):
    def own(self) -> list[int]:
        return list(range(self.count))


def test_a_stream_that_each_worker_would_repeat_is_refused() -> None:
    assert sum(len(batch) for batch in epochs(Loader(Same(), 6, workers=1), 1)[0]) == 48
    with pytest.raises(DataError, match=r"several workers would read all of Same.*get_worker_info\(\), or take workers=1"):
        next(iter(Loader(Same(), 6, workers=2)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Loader(Numbers(5), 6), "has 5 samples, fewer than a batch of 6"),
        (lambda: Loader(Numbers(0), 1, drop_last=False), "has 0 samples"),
        (lambda: list(Loader(Plain(5), 6)), "Plain gave fewer samples in epoch 0 than a batch of 6"),
        (lambda: Loader(Plain(), 6, shuffle=True), "Plain is a stream, whose order is its own"),
        (lambda: Loader(7, 1), "int has no samples to read"),  # type: ignore[arg-type]
        (lambda: Loader(Numbers(5), 0), "batch_size=0"),
        (lambda: Loader(Numbers(9), 3).load_state_dict(Loader(Numbers(8), 3).state_dict()), "taken with samples=8, here samples=9"),
        (lambda: Loader(Numbers(9), 3, seed=1).load_state_dict(Loader(Numbers(9), 3).state_dict()), "seed=0, here seed=1"),
    ],
)
def test_what_cannot_be_loaded(make: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        make()
