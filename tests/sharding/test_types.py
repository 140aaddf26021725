"""Parts of a dim: every element on exactly one rank, spread evenly, and put back where it was."""

from __future__ import annotations

from dataclasses import replace

import torch
from hypothesis import given
from hypothesis import strategies as st

from shardwise.sharding.dealing import coordinates, distribute
from shardwise.sharding.types import I, P, R, Shard, canonical, join, lengths, local_shape, part, take

small = st.integers(1, 4)


@st.composite
def split_dims(draw: st.DrawFn) -> tuple[int, Shard, int]:
    """The size of a dim, how it is split, and over how many ranks; ranks may get nothing."""
    blocks, pieces, unit = draw(small), draw(st.integers(0, 9)), draw(small)
    return blocks * pieces * unit, Shard(draw(st.integers(0, 2)), blocks, unit), draw(st.integers(1, 5))


@st.composite
def owned_dims(draw: st.DrawFn) -> tuple[int, Shard, int]:
    """The same for a dim that one rank has all of."""
    ranks = draw(st.integers(1, 5))
    return draw(st.integers(0, 9)), Shard(draw(st.integers(0, 2)), owner=draw(st.integers(0, ranks - 1))), ranks


@st.composite
def mirrored_dims(draw: st.DrawFn) -> tuple[int, Shard, int]:
    """The same for a dim of which each rank has a run from each end."""
    size, shard, ranks = draw(split_dims())
    return size, replace(shard, mirrored=True), ranks


def whole_tensor(size: int, dim: int) -> torch.Tensor:
    shape = [3, 2, 4]
    shape[dim] = size
    return torch.arange(shape[0] * shape[1] * shape[2]).reshape(shape)


@given(split_dims() | owned_dims() | mirrored_dims())
def test_every_element_is_on_one_rank(case: tuple[int, Shard, int]) -> None:
    size, shard, ranks = case
    held = [part(size, shard, ranks, rank).indices() for rank in range(ranks)]
    assert sorted(torch.cat(held).tolist()) == list(range(size))
    assert [len(each) for each in held] == lengths(size, shard, ranks) == [part(size, shard, ranks, rank).length for rank in range(ranks)]


@given(mirrored_dims())
def test_a_run_from_each_end(case: tuple[int, Shard, int]) -> None:
    """The first rank has the first and the last pieces, as many as the others but for one or two."""
    size, shard, ranks = case
    held = lengths(size, shard, ranks)
    assert max(held) - min(held) <= 2 * shard.blocks * shard.unit
    whole = part(size, shard, ranks, 0)
    if size >= 2 * ranks * shard.blocks * shard.unit:
        assert whole.start == 0 and whole.runs[-1][1] == whole.block
    for rank in range(ranks):
        assert all(end % shard.unit == 0 for run in part(size, shard, ranks, rank).runs for end in run)


@given(split_dims())
def test_pieces_are_spread_evenly_and_never_cut(case: tuple[int, Shard, int]) -> None:
    size, shard, ranks = case
    shares = [length // (shard.blocks * shard.unit) for length in lengths(size, shard, ranks)]
    assert max(shares) - min(shares) <= 1 and shares == sorted(shares, reverse=True)
    for rank in range(ranks):
        held = part(size, shard, ranks, rank)
        assert held.start % shard.unit == held.stop % shard.unit == 0


@given(split_dims() | owned_dims() | mirrored_dims())
def test_take_follows_the_indices_and_join_reverses_it(case: tuple[int, Shard, int]) -> None:
    size, shard, ranks = case
    whole = whole_tensor(size, shard.dim)
    parts = [take(whole, shard, ranks, rank) for rank in range(ranks)]
    for rank, held in enumerate(parts):
        assert torch.equal(held, whole.index_select(shard.dim, part(size, shard, ranks, rank).indices()))
    assert torch.equal(join(parts, shard), whole)


@given(split_dims() | owned_dims() | mirrored_dims())
def test_canonical_describes_the_same_parts(case: tuple[int, Shard, int]) -> None:
    size, shard, ranks = case
    simple = canonical(shard, size, ranks)
    assert canonical(simple, size, ranks) == simple
    for rank in range(ranks):
        assert torch.equal(part(size, shard, ranks, rank).indices(), part(size, simple, ranks, rank).indices())


@given(split_dims(), split_dims())
def test_local_shape_of_two_axes(first: tuple[int, Shard, int], second: tuple[int, Shard, int]) -> None:
    """The outer axis splits first; here the dims differ, or the inner axis splits what is left of the same one."""
    (size, outer, dp), (other, inner, tp) = first, second
    shape = [3, 2, 4]
    shape[inner.dim], shape[outer.dim] = other, size
    inner = Shard(inner.dim) if inner.dim == outer.dim else inner
    mesh, type_ = {"dp": dp, "tp": tp}, {"dp": outer, "tp": inner}
    held = distribute(torch.zeros(shape), type_, mesh)
    for tensor, place in zip(held, coordinates(mesh), strict=True):
        assert local_shape(tuple(shape), type_, mesh, place) == tuple(tensor.shape)


def test_shapes_of_whole_tensors_stay() -> None:
    assert local_shape((5, 3), {"dp": R, "mb": I, "tp": P}, {"dp": 2, "mb": 2, "tp": 2}, {"dp": 1, "mb": 0, "tp": 1}) == (5, 3)


def test_the_examples_of_the_module() -> None:
    def held(size: int, shard: Shard) -> list[list[int]]:
        return [part(size, shard, 2, rank).indices().tolist() for rank in range(2)]

    assert held(6, Shard(0)) == [[0, 1, 2], [3, 4, 5]]
    assert held(8, Shard(0, blocks=2)) == [[0, 1, 4, 5], [2, 3, 6, 7]]
    assert held(6, Shard(0, unit=2)) == [[0, 1, 2, 3], [4, 5]]


def test_types_print_as_in_the_design() -> None:
    assert str((Shard(0), Shard(1, blocks=3, unit=2), P, R, I)) == "(S(0), S(1, blocks=3, unit=2), P, R, I)"
