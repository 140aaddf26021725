"""One rank of groups whose other ranks are not there: messages take their memory, end at once, and all that arrives is zero."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from shardwise.runtime import collectives, transport
from shardwise.sharding.collectives import group_ranks

__all__ = ["Group", "Living", "alone"]


@dataclass(frozen=True)
class Group:
    """This rank's number in a group of so many."""

    rank: int
    ranks: int


@dataclass
class _Work:
    """Holds what is sent and received, as torch's does."""

    tensors: Sequence[Tensor]

    def wait(self) -> None:
        self.tensors = ()

    def is_completed(self) -> bool:
        return False


@contextmanager
def alone(rank: int = 0) -> Iterator[None]:
    """Inside, `shardwise.runtime.collectives` and `Distributed` work on a `Group`, a named one being that of the global `rank`."""

    def post(sends: Mapping[int, Tensor], receives: Mapping[int, Tensor], group: Group, tag: int) -> list[_Work]:
        for tensor in receives.values():
            tensor.zero_()
        return [_Work([*sends.values(), *receives.values()])]

    def into(result: Tensor, source: Tensor, **_: Any) -> _Work:
        result.zero_()
        return _Work([result, source])

    def named(name: str) -> Group:
        ranks = group_ranks(name)
        return Group(ranks.index(rank), len(ranks))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.distributed, "get_rank", lambda group: group.rank)
        patch.setattr(torch.distributed, "get_world_size", lambda group: group.ranks)
        patch.setattr(torch.distributed, "all_reduce", lambda tensor, **_: _Work([tensor]))
        patch.setattr(torch.distributed, "isend", lambda tensor, peer: _Work([tensor]))
        patch.setattr(torch.distributed, "irecv", lambda tensor, peer: _Work([tensor.zero_()]))
        patch.setattr(collectives, "_post", post)
        patch.setattr(collectives, "_GATHER", into)
        patch.setattr(collectives, "_SCATTER", into)
        patch.setattr(transport, "find_group", named)
        yield


class Living(TorchDispatchMode):
    """Bytes of the storages that live, looked at after every operator; what lived before counts as it is given."""

    def __init__(self, before: Sequence[Tensor] = ()) -> None:
        super().__init__()
        self.known: dict[int, tuple[StorageWeakRef, int]] = {}
        self.ignored: set[int] = set()
        for tensor in before:
            self._add(tensor)
        self.start_bytes = self.peak_bytes = self.now_bytes()

    def ignore(self, tensors: Sequence[Tensor]) -> None:
        """What somebody else keeps."""
        self.ignored |= {tensor.untyped_storage()._cdata for tensor in tensors}

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata not in self.ignored:
            self.known[storage._cdata] = StorageWeakRef(storage), storage.nbytes()

    def now_bytes(self) -> int:
        """Of those that live."""
        self.known = {key: (ref, size) for key, (ref, size) in self.known.items() if not ref.expired()}
        return sum(size for _, size in self.known.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._add(tensor)
        self.peak_bytes = max(self.peak_bytes, self.now_bytes())
        return result
