"""Every reshard keeps the value whole, and takes the gradient from the type of the target's to the type of the source's."""

from __future__ import annotations

from itertools import permutations, product

import pytest
import torch
from tests.sharding.emulate import run_ranks
from torch import Tensor

from shardwise.runtime.group import create_groups
from shardwise.runtime.launch import launch
from shardwise.sharding.collectives import group_name
from shardwise.sharding.dealing import combine, coordinates, distribute, group_along, require_same
from shardwise.sharding.reshard import Axis, Reshard, collective_of, dual, moves, reshard, within
from shardwise.sharding.types import I, P, Placement, R, Shard, Type, local_shape

SHAPE = (10, 12, 4)  # 10: uneven on 3 ranks; blocks of 5 and 6 on 2 and 3 ranks; 4 uneven on 3
PLACEMENTS: tuple[Placement, ...] = (
    P,
    R,
    I,
    Shard(0),
    Shard(1),
    Shard(2),
    Shard(0, blocks=2),
    Shard(1, blocks=2),
    Shard(0, unit=2),
    Shard(1, 2, 2),
    Shard(0, owner=1),
    Shard(1, owner=0),
    Shard(0, mirrored=True),
    Shard(1, blocks=2, mirrored=True),
)
PAIRS = list(permutations(PLACEMENTS, 2))


def step(source: Placement, target: Placement, ranks: int, rank: int) -> Reshard:
    axis = Axis(name="tp", group=group_name("tp", range(ranks)), ranks=ranks, rank=rank)
    sizes = [SHAPE[each.dim] if isinstance(each, Shard) else 0 for each in (source, target)]
    return Reshard(source=source, target=target, axis=axis, source_size=sizes[0], target_size=sizes[1])


def there_and_back(source: Placement, target: Placement, held: Tensor, seed: Tensor, ranks: int, rank: int) -> tuple[Tensor, Tensor]:
    """One rank's result and gradient."""
    leaf = held.clone().requires_grad_()
    result = reshard(leaf, step(source, target, ranks, rank))
    (gradient,) = torch.autograd.grad(result, leaf, seed)
    return result.detach(), gradient


def dealt(source: Placement, target: Placement, ranks: int) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
    """A value and a gradient: whole, and as the ranks hold them before the reshard and before its backward."""
    torch.manual_seed(0)
    whole, seed = torch.randn(SHAPE, dtype=torch.float64), torch.randn(SHAPE, dtype=torch.float64)
    mesh = {"tp": ranks}
    return whole, seed, distribute(whole, {"tp": source}, mesh), distribute(seed, {"tp": dual(target)}, mesh)


def check(source: Placement, target: Placement, results: list[tuple[Tensor, Tensor]]) -> None:
    ranks = len(results)
    whole, seed, _, _ = dealt(source, target, ranks)
    label = f"{source} → {target} on {ranks} ranks"
    require_same(combine([result for result, _ in results], {"tp": target}, {"tp": ranks}, SHAPE), whole, label)
    gradient = combine([gradient for _, gradient in results], {"tp": dual(source)}, {"tp": ranks}, SHAPE)
    require_same(gradient, seed, f"gradient of {label}")


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize(("source", "target"), PAIRS, ids=str)
def test_reshard(source: Placement, target: Placement, ranks: int) -> None:
    _, _, held, seeds = dealt(source, target, ranks)
    check(source, target, run_ranks(ranks, lambda rank: there_and_back(source, target, held[rank], seeds[rank], ranks, rank)))


@pytest.mark.parametrize(("source", "target"), PAIRS, ids=str)
def test_the_collective_is_the_declared_one(source: Placement, target: Placement) -> None:
    """What the cost model is told is what is run."""
    _, _, held, seeds = dealt(source, target, 2)
    asked: list[str] = []

    def choose(kind: str, nbytes: int, ranks: int) -> str:
        asked.append(kind)
        return "native"

    def work(rank: int) -> None:
        move = step(source, target, 2, rank)
        watched = Reshard(**{**move.__dict__, "choose": choose if rank == 0 else move.choose})
        watched.forward(held[rank])
        watched.backward(seeds[rank])

    run_ranks(2, work)
    assert asked == [kind for kind in (collective_of(source, target), collective_of(dual(target), dual(source))) if kind]


def test_a_gradient_has_a_type() -> None:
    assert [dual(each) for each in (P, R, I, Shard(1, 2))] == [I, P, I, Shard(1, 2)]


# -- several axes ------------------------------------------------------------------------------------------------------------------------

MESH = {"cp": 2, "tp": 3}
PAIRED = (P, R, I, Shard(0), Shard(1), Shard(0, unit=2))
BLOCKS = Shard(1, blocks=3)  # of which each rank of tp has one
ON_TWO = [{"cp": cp, "tp": tp} for cp, tp in product(PAIRED, repeat=2) if (cp, tp) != (Shard(0), Shard(0, unit=2))]  # 5 rows: no pairs
ON_TWO += [{"cp": BLOCKS, "tp": tp} for tp in (R, P, Shard(0), Shard(1))]


def through_moves(made: Type, wanted: Type, held: Tensor, seed: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """One rank's result and gradient, one axis after the other."""
    place = coordinates(MESH)[rank]
    leaf = held.clone().requires_grad_()
    now, result = dict(made), leaf.view_as(leaf)
    for axis, target in moves(made, wanted, MESH):
        source, others = now[axis], {name: each for name, each in now.items() if name != axis}
        sizes = [local_shape(SHAPE, others, MESH, place)[each.dim] if isinstance(each, Shard) else 0 for each in (source, target)]
        along = Axis(name=axis, group=group_along(MESH, axis, place), ranks=MESH[axis], rank=place[axis])
        inner = {"tp": now["tp"]} if axis == "cp" else {}
        step = Reshard(
            source=within(source, inner, MESH),
            target=within(target, inner, MESH),
            axis=along,
            source_size=sizes[0],
            target_size=sizes[1],
        )
        result = reshard(result, step)
        now[axis] = target
    assert now == wanted
    (gradient,) = torch.autograd.grad(result, leaf, seed)
    return result.detach(), gradient


@pytest.mark.parametrize("made", ON_TWO, ids=str)
def test_reshards_of_two_axes(made: Type) -> None:
    """Also where both split one dim and only the outer one changes, or both change to and from it."""
    for wanted in ON_TWO:
        torch.manual_seed(0)
        whole, seed = torch.randn(SHAPE, dtype=torch.float64), torch.randn(SHAPE, dtype=torch.float64)
        held = distribute(whole, made, MESH)
        seeds = distribute(seed, {axis: dual(each) for axis, each in wanted.items()}, MESH)
        results = run_ranks(6, lambda rank: through_moves(made, wanted, held[rank], seeds[rank], rank))  # noqa: B023
        label = f"{made} → {wanted}"
        require_same(combine([result for result, _ in results], wanted, MESH, SHAPE), whole, label)
        gradients = [gradient for _, gradient in results]
        require_same(combine(gradients, {axis: dual(each) for axis, each in made.items()}, MESH, SHAPE), seed, f"gradient of {label}")


def test_only_an_inner_axis_of_a_dim_that_changes_is_taken_together() -> None:
    both, outer = {"dp": R, "cp": Shard(0), "tp": Shard(0)}, {"dp": R, "cp": R, "tp": Shard(0)}
    assert moves(both, outer) == [("tp", I), ("cp", R), ("tp", Shard(0))]
    assert moves(outer, both) == [("tp", I), ("cp", Shard(0)), ("tp", Shard(0))]
    assert moves(both, {**both, "tp": R}) == [("tp", R)]
    assert moves(both, {"dp": Shard(1), "cp": Shard(0), "tp": Shard(0)}) == [("dp", Shard(1))]
    assert moves({"dp": R, "cp": Shard(0), "tp": P}, outer) == [("cp", R), ("tp", Shard(0))]
    every = dict.fromkeys(both, Shard(0))
    assert moves(every, {**every, "dp": R}) == [("tp", I), ("cp", I), ("dp", R), ("cp", Shard(0)), ("tp", Shard(0))]


def test_an_outer_axis_that_splits_whole_blocks_of_an_inner_ones_changes_alone() -> None:
    before, after = {"cp": Shard(0), "tp": Shard(1)}, {"cp": BLOCKS, "tp": Shard(1)}
    assert moves(before, after, MESH) == [("cp", BLOCKS)] and moves(after, before, MESH) == [("cp", Shard(0))]
    assert moves(before, after) == [("tp", I), ("cp", BLOCKS), ("tp", Shard(1))]
    assert moves(before, {"cp": Shard(1, blocks=2), "tp": Shard(1)}, MESH) == [("tp", I), ("cp", Shard(1, blocks=2)), ("tp", Shard(1))]
    assert moves(after, {"cp": Shard(0), "tp": R}, MESH) == [("tp", R), ("cp", Shard(0))]
    with pytest.raises(AssertionError, match="is not in 3 times so many blocks"):
        within(Shard(1, blocks=2), {"tp": Shard(1)}, MESH)


def _on_a_real_rank(ranks: int) -> list[tuple[Tensor, Tensor]]:
    create_groups([("tp", tuple(range(ranks)))])
    rank = torch.distributed.get_rank()
    results = []
    for source, target in PAIRS:
        _, _, held, seeds = dealt(source, target, ranks)
        results.append(there_and_back(source, target, held[rank], seeds[rank], ranks, rank))
    return results


@pytest.mark.distributed
def test_reshard_on_real_ranks() -> None:
    found = launch(_on_a_real_rank, (3,), ranks=3, threads=1)
    for number, (source, target) in enumerate(PAIRS):
        check(source, target, [each[number] for each in found])
