"""Constructions that are put off give the values, bit by bit, and leave the generators, that ordinary ones do."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
from tests.models import MODELS, mixtral, t5
from torch import Tensor, nn

from shardwise.capture.deferred import defer
from shardwise.errors import CaptureError
from shardwise.runtime.memory import PeakMemory

OUTSIDE = torch.ones(3)
BUILDERS: dict[str, Callable[[], nn.Module]] = {}


def builder(function: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    BUILDERS[function.__name__] = function
    return function


@builder
def layers() -> nn.Module:
    return nn.Sequential(nn.Linear(9, 7), nn.LayerNorm(7), nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Embedding(11, 6, padding_idx=2))


@builder
def recurrent() -> nn.Module:
    return nn.LSTM(5, 6, num_layers=2, bidirectional=True)


@builder
def copied() -> nn.Module:
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 24), 3, enable_nested_tensor=False)


@builder
def drawn_twice() -> nn.Module:
    """As transformers does: every layer's own first, then all once more, the last ones scaled."""
    model = nn.Sequential(*(nn.Linear(20, 20) for _ in range(4)))
    for module in model:
        nn.init.normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
    with torch.no_grad():
        model[3].weight.mul_(0.5)
        model[2].weight.copy_(model[1].weight.T)
    return model


@builder
def many_kinds() -> nn.Module:
    model = nn.ParameterList([nn.Parameter(torch.empty(12, 8)) for _ in range(8)])
    nn.init.trunc_normal_(model[0], std=0.3)
    nn.init.orthogonal_(model[1])
    nn.init.sparse_(model[2], 0.4)
    nn.init.eye_(model[3])
    nn.init.xavier_normal_(model[4])
    with torch.no_grad():
        model[5][:4].uniform_()
        model[5][4:] = torch.arange(64.0).view(8, 8)
        model[6].bernoulli_(0.3)
        model[7].copy_(torch.multinomial(torch.rand(12, 30), 8))
    return model


@builder
def tied() -> nn.Module:
    model = nn.Sequential(nn.Embedding(10, 6), nn.Linear(6, 10, bias=False))
    model[1].weight = model[0].weight
    model.register_buffer("rows", model[0].weight.detach()[2:4])
    return model


@builder
def asks_for_values() -> nn.Module:
    rates = torch.linspace(0, 0.3, 4).tolist()
    model = nn.Sequential(*(nn.Dropout(rate) for rate in rates), nn.Linear(3, int(torch.randint(2, 9, ()))))
    model.scale = torch.tensor([2.0, rates[1]])  # an attribute, no buffer
    return model


@builder
def from_numpy() -> nn.Module:
    rows = torch.from_numpy(np.arange(12, dtype=np.float32).reshape(3, 4))
    model = nn.Linear(4, 3)
    model.weight.data.copy_(rows)
    model.extra = nn.Parameter(rows.clone())
    model.given = nn.Parameter(torch.from_numpy(np.ones(3)))
    return model


@builder
def other_dtypes() -> nn.Module:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        first = nn.Linear(3, 3)
    finally:
        torch.set_default_dtype(before)
    return nn.Sequential(first, nn.Linear(4, 4).to(torch.bfloat16), nn.Linear(2, 2).requires_grad_(False))


@builder
def normalized() -> nn.Module:
    return nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), nn.utils.parametrizations.spectral_norm(nn.Linear(5, 5)))


@builder
def generators() -> nn.Module:
    """Seeds, forks, states put back, generators of its own."""
    torch.manual_seed(3)
    own = torch.Generator().manual_seed(9)
    model = nn.ParameterList([nn.Parameter(torch.randn(20))])
    with torch.random.fork_rng(devices=[]):
        model.append(nn.Parameter(torch.rand(30, generator=own)))
        model.append(nn.Parameter(torch.randn(40)))
        torch.manual_seed(4)
        model.append(nn.Parameter(torch.randn(17)))
    model.append(nn.Parameter(torch.randn(21)))
    state = torch.get_rng_state()
    model.append(nn.Parameter(torch.randn(5, 7).normal_(generator=own)))
    torch.set_rng_state(state)
    model.append(nn.Parameter(torch.randperm(30, generator=own).float()))
    model.append(nn.Parameter(torch.randn(33)))
    return model


for name, make in {**MODELS, "mixtral": mixtral, "t5": t5}.items():
    BUILDERS[name] = lambda make=make: make()[0]  # type: ignore[misc]


def state(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers(remove_duplicate=False))}


@pytest.mark.parametrize("name", BUILDERS)
def test_the_values_are_those_of_an_ordinary_construction(name: str) -> None:
    build = BUILDERS[name]
    torch.manual_seed(7)
    expected = state(build())
    after = torch.get_rng_state()

    torch.manual_seed(7)
    before = torch.get_rng_state()
    deferred = defer(build)
    assert torch.equal(torch.get_rng_state(), before), "nothing is drawn before it is wanted"
    described = state(deferred.model)
    assert list(described) == list(expected)
    assert all(tensor.is_meta for tensor in described.values())
    for each, tensor in expected.items():
        assert (described[each].shape, described[each].stride(), described[each].dtype) == (tensor.shape, tensor.stride(), tensor.dtype)
        assert (type(described[each]), described[each].requires_grad) == (type(tensor), tensor.requires_grad)
        assert {n for n, other in expected.items() if other is tensor} == {n for n, o in described.items() if o is described[each]}
    torch.manual_seed(99)  # what is drawn does not depend on what was done since
    values = deferred.values(dict.fromkeys(expected, torch.clone))
    for each, tensor in expected.items():
        assert torch.equal(values[each], tensor), each
    assert torch.equal(torch.get_rng_state(), after)


def test_some_of_the_values_are_the_same_ones() -> None:
    torch.manual_seed(1)
    expected = state(drawn_twice())
    torch.manual_seed(1)
    deferred = defer(drawn_twice)
    for name, tensor in expected.items():
        assert torch.equal(deferred.values({name: lambda whole: whole[2:5]})[name], tensor[2:5]), name


def test_what_needs_no_numbers_draws_none() -> None:
    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))

    deferred, before = defer(build), torch.get_rng_state()
    assert torch.equal(deferred.values({"1.running_var": torch.clone})["1.running_var"], torch.ones(4))
    assert torch.equal(torch.get_rng_state(), before)


def test_attributes_have_their_values() -> None:
    torch.manual_seed(0)
    expected = asks_for_values()
    torch.manual_seed(0)
    model = defer(asks_for_values).model
    assert [module.p for module in model[:4]] == [module.p for module in expected[:4]]
    assert (model[4].out_features, model.scale.tolist()) == (expected[4].out_features, expected.scale.tolist())


def test_parameters_that_modules_keep_twice_stay_one() -> None:
    model = defer(recurrent).model
    assert all(one is other for one, other in zip(model._flat_weights, model.parameters(), strict=True))


def test_the_rest_of_what_is_returned_is_described() -> None:
    model, batch = defer(MODELS["llama"]).described
    assert isinstance(model, nn.Module)
    assert batch["input_ids"].is_meta and list(batch["input_ids"].shape) == [4, 32]


def random_program(seed: int) -> Callable[[], nn.Module]:
    """A construction of random operators in place on whole tensors, on parts, and between tensors."""

    def build() -> nn.Module:
        choose = random.Random(seed)
        tensors = [torch.zeros(4, 6)]
        for _ in range(30):
            chosen, other = choose.choice(tensors), choose.choice(tensors)
            part = chosen[choose.randrange(3) :] if choose.random() < 0.4 else chosen
            other = other.clone() if other.untyped_storage()._cdata == chosen.untyped_storage()._cdata else other
            {
                0: lambda: tensors.append(torch.empty(4, 6).normal_()),
                1: lambda other=other: tensors.append(torch.randn(4, 6) * other),
                2: lambda: tensors.append(torch.full((4, 6), 2.0)),
                3: lambda part=part: part.normal_(),
                4: lambda part=part: part.uniform_(0.5, 1.5),
                5: lambda part=part: part.fill_(choose.random()),
                6: lambda part=part, other=other: part.copy_(other[-len(part) :]),
                7: lambda part=part, other=other: part.add_(other[: len(part)], alpha=0.1),
                8: lambda part=part: part.mul_(0.9),
                9: lambda: torch.manual_seed(choose.randrange(5)),
                10: lambda: tensors.append(tensors[-1].reshape(6, 4).t()),
                11: lambda part=part: part.copy_(part.flip(0)),
            }[choose.randrange(12)]()
        model = nn.Module()
        for index, tensor in enumerate(tensors):
            model.register_buffer(f"of_{index}", tensor)
        return model

    return build


@pytest.mark.parametrize("seed", range(40))
def test_random_constructions(seed: int) -> None:
    torch.manual_seed(0)
    expected = state(random_program(seed)())
    after = torch.get_rng_state()
    torch.manual_seed(0)
    deferred = defer(random_program(seed))
    wanted = random.Random(seed).sample(sorted(expected), k=max(1, len(expected) // 2))
    values = deferred.values(dict.fromkeys(wanted, torch.clone))
    assert all(torch.equal(values[name], expected[name]) for name in wanted)
    if not torch.equal(torch.get_rng_state(), torch.Generator().manual_seed(0).get_state()):
        assert torch.equal(torch.get_rng_state(), after)


def test_no_more_than_what_is_kept_and_one_tensor() -> None:
    count, rows = 24, 1024  # of 4 MiB each

    def build() -> nn.Module:
        model = nn.Sequential(*(nn.Linear(rows, rows, bias=False) for _ in range(count)))
        for module in model:
            nn.init.normal_(module.weight)
        with torch.no_grad():
            for module in model:
                module.weight.mul_(0.1)
        return model

    deferred, whole = defer(build), count * 4 * rows**2
    deferred.values({"0.weight": lambda tensor: tensor[:1].clone()})  # code is loaded
    memory = PeakMemory()
    found = deferred.values({f"{index}.weight": lambda tensor: tensor[: rows // 8].clone() for index in range(count)})
    kept = sum(tensor.nbytes for tensor in found.values())
    assert memory.peak_bytes() < kept + 3 * 4 * rows**2 < whole / 2


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: nn.Linear(2, 2).weight.detach().numpy(), r"cannot be built without its weights.*Build it on cpu"),
        (lambda: nn.Linear(3, 2).weight, r"returned .*, with no nn.Module in it"),
        (lambda: OUTSIDE.add_(torch.ones(3)), r"changes a tensor of shape \[3\] that was made before the model was built"),
        (lambda: 1 / 0, "ZeroDivisionError"),
    ],
)
def test_what_cannot_be_put_off_is_said(build: Callable[[], nn.Module], message: str) -> None:
    before = torch.get_rng_state()
    with pytest.raises(CaptureError, match=message):
        defer(build)
    assert torch.equal(torch.get_rng_state(), before)
