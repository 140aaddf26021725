"""Random numbers by key: of the right distribution, independent, the same in every precision; and every random operator becomes one."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shardwise.capture import draws as draws_of
from shardwise.capture import operators
from shardwise.capture.export import capture
from shardwise.capture.graph import Graph
from shardwise.capture.normalize import RANDOM_STATE, is_random
from shardwise.verify.cast import cast_graph, cast_tensor

STATE = torch.tensor([987654321987654321, 0])
COUNT = 100_000


def draws(distribution: str, *parameters: float, key: int = 4, state: Tensor = STATE, dtype: torch.dtype = torch.float64) -> Tensor:
    return operators.keyed_draw(state, [COUNT], distribution, list(parameters), dtype, key=key)


def chi_squared(values: Tensor, bins: int = 100) -> float:
    """Of numbers in [0, 1) against uniform ones, in standard deviations of its own."""
    counts = torch.histc(values, bins, 0, 1)
    wanted = len(values) / bins
    return float((((counts - wanted) ** 2 / wanted).sum() - (bins - 1)) / math.sqrt(2 * (bins - 1)))


@pytest.mark.parametrize("key", [0, 1, 7, 1000])
def test_uniform_numbers_are_uniform(key: int) -> None:
    values = draws("uniform", 0.0, 1.0, key=key)
    assert values.min() >= 0 and values.max() < 1
    assert abs(chi_squared(values)) < 4
    assert abs(chi_squared((values * 2**20) % 1)) < 4  # the lower bits, too
    assert abs(chi_squared((values * 2**40) % 1)) < 4


@pytest.mark.parametrize(
    ("distribution", "parameters", "cumulative"),
    [
        ("normal", (1.0, 2.0), lambda x: 0.5 * (1 + torch.erf((x - 1) / (2 * math.sqrt(2))))),
        ("log_normal", (0.0, 1.0), lambda x: 0.5 * (1 + torch.erf(x.log() / math.sqrt(2)))),
        ("exponential", (2.0,), lambda x: 1 - torch.exp(-2 * x)),
        ("cauchy", (1.0, 2.0), lambda x: torch.atan((x - 1) / 2) / math.pi + 0.5),
        ("uniform", (-1.0, 3.0), lambda x: (x + 1) / 4),
    ],
)
def test_distributions(distribution: str, parameters: tuple[float, ...], cumulative: Callable[[Tensor], Tensor]) -> None:
    """Through the distribution function every distribution becomes the uniform one."""
    assert abs(chi_squared(cumulative(draws(distribution, *parameters)))) < 4


def test_whole_numbers() -> None:
    values = draws("integers", -3, 5, dtype=torch.int64)
    counts = torch.bincount(values + 3)
    assert len(counts) == 8 and (counts - COUNT / 8).abs().max() < 4.5 * math.sqrt(COUNT / 8)
    wide = draws("integers", 0, 2**50, dtype=torch.int64)
    assert abs(chi_squared(wide.double() / 2**50)) < 4
    assert abs(float(draws("bernoulli", 0.3, 2.0).mean()) - 0.6) < 0.01
    assert abs(float(draws("geometric", 0.25).mean()) - 4) < 0.1
    assert draws("geometric", 0.25).min() == 1


@pytest.mark.parametrize("other", [{"key": 5}, {"state": STATE + torch.tensor([1, 0])}, {"state": STATE + torch.tensor([1 << 40, 0])}])
@pytest.mark.parametrize("shift", [0, 1, 17])
def test_other_keys_and_steps_and_places_are_independent(other: dict[str, Any], shift: int) -> None:
    first, second = draws("normal", 0.0, 1.0), draws("normal", 0.0, 1.0, **other)
    assert abs(float((first * second.roll(shift)).mean())) < 4.5 / math.sqrt(COUNT)
    if shift:
        assert abs(float((first * first.roll(shift)).mean())) < 4.5 / math.sqrt(COUNT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_precision_has_the_same_numbers(dtype: torch.dtype) -> None:
    rounding = torch.finfo(dtype).eps
    for distribution, parameters in (("uniform", (0.0, 1.0)), ("normal", (0.0, 1.0)), ("exponential", (1.0,)), ("bernoulli", (0.3, 1.0))):
        small, large = draws(distribution, *parameters, dtype=dtype), draws(distribution, *parameters)
        assert torch.allclose(small.double(), large, rtol=rounding, atol=rounding)
    assert draws("uniform", 0.0, 1.0, dtype=dtype).max() < 1
    assert draws("exponential", 1.0, dtype=dtype).min() > 0


def test_permutations_and_choices() -> None:
    permutation = operators.keyed_permutation(STATE, 1000, torch.int64, key=1)
    assert permutation.sort().values.tolist() == list(range(1000))
    assert abs(float(torch.corrcoef(torch.stack([permutation, torch.arange(1000)]).double())[0, 1])) < 0.15
    weights = torch.tensor([1.0, 0.0, 2.0, 5.0]).expand(COUNT // 10, 4)
    first = operators.keyed_multinomial(weights, STATE, 2, False, key=2)
    again = operators.keyed_multinomial(weights, STATE, 2, True, key=3)
    assert (first[:, 0] != first[:, 1]).all()
    for chosen in (first[:, 0], again[:, 0], again[:, 1]):
        frequencies = torch.bincount(chosen, minlength=4) / len(chosen)
        assert torch.allclose(frequencies, weights[0] / 8, atol=0.02)
        assert frequencies[1] == 0


# -- captured models ---------------------------------------------------------------------------------------------------------------------


class Noisy(nn.Module):
    """A linear layer whose output goes through `noise`; its loss is the mean."""

    def __init__(self, noise: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.noise = noise

    def forward(self, x: Tensor) -> Tensor:
        return self.noise(self.linear(x)).square().mean()


NOISES: dict[str, Callable[[Tensor], Tensor]] = {
    "rand": lambda x: x + torch.rand(x.shape) + torch.rand_like(x),
    "randn": lambda x: x + torch.randn(x.shape[0], 1, 1) + torch.randn_like(x),
    "randint": lambda x: x + torch.randint(3, x.shape) + torch.randint_like(x, 2, 9) + torch.randint_like(x, 4),
    "bernoulli": lambda x: x * torch.bernoulli(x.sigmoid()) + torch.bernoulli(x, 0.3),
    "bernoulli_": lambda x: x + torch.empty_like(x).bernoulli_(0.3) + torch.empty_like(x).bernoulli_(x.detach().sigmoid()),
    "normal": lambda x: x + torch.normal(x, x.abs()) + torch.normal(x, 1.0) + torch.normal(0.0, x.abs()) + torch.normal(0.0, 1.0, x.shape),
    "normal_": lambda x: x + torch.empty_like(x).normal_(0, 2) + torch.empty_like(x).log_normal_(),
    "uniform_": lambda x: x + torch.empty_like(x).uniform_(-1, 1) + torch.empty_like(x).cauchy_().tanh(),
    "exponential_": lambda x: x + torch.empty_like(x).exponential_() + torch.empty_like(x).geometric_(0.3),
    "randperm": lambda x: x * x[:, torch.randperm(x.shape[1])],
    "multinomial": lambda x: x + torch.multinomial(x[0].softmax(-1), 3)[:, :1] + torch.multinomial(x[0].softmax(-1), 6, True),
    "gumbel_softmax": lambda x: F.gumbel_softmax(x) + F.gumbel_softmax(x, hard=True),
    "dropout": lambda x: F.dropout(x) + F.dropout(x + 1, inplace=True),
    "feature_dropout": lambda x: F.dropout2d(x[..., None])[..., 0] + F.dropout1d(x),
    "alpha_dropout": lambda x: F.alpha_dropout(x, training=True) + F.feature_alpha_dropout(x, training=True),
    "rrelu": lambda x: F.rrelu(x, training=True) + F.rrelu(x),
    "distributions": lambda x: torch.distributions.Normal(x, x.abs(), validate_args=False).rsample(),
    "attention": lambda x: F.scaled_dot_product_attention(x, x, x, dropout_p=0.3),
}


def drawn(noise: str) -> Graph:
    return capture(Noisy(NOISES[noise]), {"x": torch.empty(3, 3, 6)})


def outcome(graph: Graph, state: Tensor) -> Tensor:
    torch.manual_seed(0)
    model, x = Noisy(NOISES["rand"]), torch.randn(3, 3, 6)
    dtype = next(iter(graph.parameters.values())).dtype
    tensors = {name: cast_tensor(tensor, dtype).detach().requires_grad_() for name, tensor in model.state_dict().items()}
    return graph.run(tensors, {"x": cast_tensor(x, dtype), RANDOM_STATE: state})[graph.loss].detach()


@pytest.mark.parametrize("noise", NOISES)
def test_random_operators_are_keyed(noise: str) -> None:
    graph = drawn(noise)
    assert not [op.name for op in graph.ops if is_random(op.target)]
    keys = [op.kwargs["key"] for op in graph.ops if op.target in operators.KEYED]
    assert keys and len(set(keys)) == len(keys)
    first, again, other = (outcome(graph, STATE + torch.tensor([step, 0])) for step in (0, 0, 1))
    assert first == again and first != other
    precise = outcome(cast_graph(graph, torch.float64), STATE)
    assert torch.allclose(first.double(), precise, rtol=1e-4)


def test_unknown_distributions_are_seen_to_be_random() -> None:
    assert all(map(is_random, (torch.ops.aten.poisson.default, torch.ops.aten.binomial.default, torch.ops.aten.rand.default)))
    assert not any(map(is_random, (torch.ops.aten.add.Tensor, torch.ops.aten.lstm.input, *operators.KEYED)))


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_dropout_between_recurrent_layers_is_keyed(kind: type[nn.RNNBase]) -> None:
    torch.manual_seed(0)
    recurrent = kind(6, 5, num_layers=3, dropout=0.4, bidirectional=True, batch_first=True)  # type: ignore[call-arg]

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.recurrent = recurrent

        def forward(self, x: Tensor) -> Tensor:
            out, last = self.recurrent(x)
            return out.square().mean() + sum(state.mean() for state in (last if isinstance(last, tuple) else [last]))

    model, x = Model(), torch.randn(3, 4, 6)
    graph = capture(model, {"x": x})
    assert sum(op.target is operators.keyed_dropout for op in graph.ops) == 2
    for op in graph.ops:
        if op.target is operators.keyed_dropout:  # without it, the layers one by one are all of them together
            op.args = (*op.args[:2], 0.0)
    found = graph.run(dict(model.named_parameters()), {"x": x, RANDOM_STATE: STATE})[graph.loss]
    assert torch.allclose(found, model.eval()(x), rtol=1e-5)


def test_alpha_dropout_keeps_mean_and_variance() -> None:
    noise = Noisy(lambda x: F.alpha_dropout(torch.randn(300, 300) + 0 * x.sum(), 0.5, True))
    mean_square = float(outcome(capture(noise, {"x": torch.empty(3, 3, 6)}), STATE))
    assert abs(mean_square - 1) < 0.05


# -- masks of dropout, and torch's own generator ------------------------------------------------------------------------------------------


def kept(probability: float, shape: tuple[int, ...], state: Tensor = STATE, key: int = 4) -> Tensor:
    return draws_of.keyed_keep(draws_of.whole(shape, torch.device("cpu")), state, probability, key)


@pytest.mark.parametrize("probability", [0.0, 0.001, 0.1, 0.5, 0.9, 0.999])
def test_dropout_keeps_its_share(probability: float) -> None:
    keep = kept(probability, (300, 1001))
    assert abs(float(keep.double().mean()) - (1 - probability)) <= 4.5 * math.sqrt(probability * (1 - probability) / keep.numel())


@pytest.mark.parametrize("other", [{"key": 5}, {"state": STATE + 1}, {"state": STATE + (1 << 40)}, {}])
@pytest.mark.parametrize("shift", [1, 2, 4, 1000, 1001, 0])
def test_masks_are_independent(other: dict[str, Any], shift: int) -> None:
    """Of those of other places, keys and steps: neighbours come from one word."""
    first, second = (kept(0.5, (300, 1001), **more).double().flatten() * 2 - 1 for more in ({}, other))
    if other or shift:
        assert abs(float((first * second.roll(shift)).mean())) < 4.5 / math.sqrt(first.numel())


@pytest.mark.parametrize("start", [0, 3, 4, 130])
@pytest.mark.parametrize("shape", [(131,), (7, 131), (3, 2, 131), (2000, 131), (300_001,)])
def test_a_part_has_the_masks_of_the_whole(shape: tuple[int, ...], start: int) -> None:
    held = draws_of.whole(shape, torch.device("cpu"))
    some = replace(held, rows=held.rows[::2], columns=held.columns[start:], shape=(-1, len(held.columns[start:])), runs=start % 4 == 0)
    keep, noise = kept(0.3, shape).reshape(-1, shape[-1]), draws_of.keyed_draw(held, STATE, "normal", (0, 1), torch.float32, 1)
    assert torch.equal(draws_of.keyed_keep(some, STATE, 0.3, 4), keep[::2, start:])
    found = draws_of.keyed_draw(some, STATE, "normal", (0, 1), torch.float32, 1)
    assert torch.equal(found, noise.reshape(-1, shape[-1])[::2, start:])


def fast(distribution: str, *parameters: float, dtype: torch.dtype = torch.float64, **more: Any) -> Tensor:
    chosen = {"state": STATE, "seeds": [4], "each": True} | more
    return draws_of.fast_draw([COUNT], chosen.pop("state"), distribution, parameters, dtype, **chosen, device=torch.device("cpu"))


@pytest.mark.parametrize(
    ("distribution", "parameters", "dtype"),
    [
        *((name, (0.5, 2.0), torch.float64) for name in ("uniform", "normal", "log_normal", "bernoulli")),
        ("exponential", (2.0,), torch.float64),
        ("geometric", (0.25,), torch.float32),
        ("integers", (-3, 5), torch.int64),
        ("bernoulli", (0.3, 1.0), torch.bool),
    ],
)
def test_torchs_numbers_are_of_the_same_distributions(distribution: str, parameters: tuple[float, ...], dtype: torch.dtype) -> None:
    found, keyed = fast(distribution, *parameters, dtype=dtype), draws(distribution, *parameters, dtype=dtype)
    assert found.dtype == keyed.dtype and found.shape == keyed.shape
    deviation = float(keyed.double().std())
    assert abs(float(found.double().mean() - keyed.double().mean())) < 6 * deviation / math.sqrt(COUNT)
    assert float(found.double().quantile(0.9)) == pytest.approx(float(keyed.double().quantile(0.9)), rel=0.13)


def test_cauchys_numbers_have_its_median() -> None:
    assert float(fast("cauchy", 1.0, 2.0).median()) == pytest.approx(1.0, abs=0.05)


def test_torchs_numbers_are_told_apart_by_their_seeds() -> None:
    def noise(**more: Any) -> Tensor:
        return fast("normal", 0.0, 1.0, **more)

    later = STATE + torch.tensor([0, 1])
    assert torch.equal(noise(), noise()) and torch.equal(noise(each=False), noise(each=False, state=later))
    others = [noise(seeds=[5]), noise(seeds=[4, 0]), noise(seeds=[4, 1]), noise(state=STATE + 1), noise(state=later), noise(each=False)]
    assert all(abs(float((noise() * other).mean())) < 4.5 / math.sqrt(COUNT) for other in others)
