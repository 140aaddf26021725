"""The order in which ranks read samples, and going on where a run stopped."""

from __future__ import annotations

import threading
import time
from itertools import chain
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import IterableDataset

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


def test_batches_are_read_ahead_in_the_background() -> None:
    data = Numbers(40)
    batches = iter(Loader(data, 4, ahead=3))
    next(batches)
    deadline = time.monotonic() + 10
    while len(data.read) < 5 * 4 and time.monotonic() < deadline:  # the one that was taken, 3 that wait, 1 in hand
        time.sleep(0.005)
    time.sleep(0.05)
    assert len(data.read) == 5 * 4
    batches.close()
    assert not any(thread.name == "reads samples" for thread in threading.enumerate())


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


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter([])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Loader(Numbers(5), 6), "has 5 samples, fewer than a batch of 6"),
        (lambda: Loader(Numbers(0), 1, drop_last=False), "has 0 samples"),
        (lambda: Loader(Stream(), 2), "Stream has no numbered samples"),
        (lambda: Loader(Numbers(5), 0), "batch_size=0"),
        (lambda: Loader(Numbers(9), 3).load_state_dict(Loader(Numbers(8), 3).state_dict()), "taken with samples=8, here samples=9"),
        (lambda: Loader(Numbers(9), 3, seed=1).load_state_dict(Loader(Numbers(9), 3).state_dict()), "seed=0, here seed=1"),
    ],
)
def test_what_cannot_be_loaded(make: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        make()
