"""What optimizers need of a parameter, found by running them; what cannot be used, and why."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from shardwise.errors import LayoutError
from shardwise.runtime.needs import needs
from shardwise.runtime.optimizer import OptimizerFactory, absent, make_on_parts, make_optimizers, make_states, prefer_fused

SHAPES = {"embed": (300, 40), "layers.0.w": (40, 160), "layers.0.b": (160,), "layers.1.w": (40, 160), "layers.1.b": (160,), "scale": ()}
MATRICES = {name: shape for name, shape in SHAPES.items() if len(shape) == 2}


class Own(torch.optim.Optimizer):
    """An optimizer that nobody knows: `update` makes a step of a gradient."""

    def __init__(self, parameters: Iterable[Any], update: Callable[[Tensor], Tensor], lr: float = 0.1) -> None:
        super().__init__(parameters, {"lr": lr})
        self.update = update

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.sub_(self.update(parameter.grad), alpha=group["lr"])


class ByAllNorms(Own):
    """Divides by the norm of all gradients."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        gradients = [each.grad for group in self.param_groups for each in group["params"] if each.grad is not None]
        norm = torch.stack([gradient.norm() for gradient in gradients]).norm()
        self.update = lambda gradient: gradient / norm
        super().step()


def by_blocks(gradient: Tensor) -> Tensor:
    """Each run of 256 elements by its largest, as optimizers with 8-bit states do; small tensors as they are."""
    if gradient.numel() < 4096:
        return gradient
    flat = torch.cat([gradient.reshape(-1), gradient.new_zeros(-gradient.numel() % 256)]).view(-1, 256)
    return (flat / flat.abs().amax(1, keepdim=True)).reshape(-1)[: gradient.numel()].view(gradient.shape)


def own(update: Callable[[Tensor], Tensor]) -> OptimizerFactory:
    return lambda named: Own([p for _, p in named], update)


ELEMENTWISE = {
    kind.__name__: (lambda named, kind=kind: kind([p for _, p in named], lr=1e-2))
    for kind in (
        *(torch.optim.AdamW, torch.optim.Adam, torch.optim.SGD, torch.optim.RMSprop, torch.optim.Adagrad, torch.optim.Adadelta),
        *(torch.optim.NAdam, torch.optim.RAdam, torch.optim.Rprop, torch.optim.ASGD, torch.optim.Adamax),
    )
} | {
    "sgd with momentum": lambda named: torch.optim.SGD([p for _, p in named], lr=1e-2, momentum=0.9, nesterov=True, weight_decay=0.1),
    "amsgrad": lambda named: torch.optim.AdamW([p for _, p in named], amsgrad=True),
    "fused": lambda named: torch.optim.AdamW([p for _, p in named], fused=True),
    "one's own, of signs": own(torch.sign),
}


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_elementwise_optimizers_are_found(name: str) -> None:
    assert needs(ELEMENTWISE[name], SHAPES) == dict.fromkeys(SHAPES, "element")


WHOLE = {
    "Adafactor": lambda named: torch.optim.Adafactor([p for _, p in named], lr=1e-2),
    "Muon": lambda named: torch.optim.Muon([p for _, p in named], lr=1e-2),
    "by rows": own(lambda g: g / g.norm(dim=1, keepdim=True)),
    "by columns": own(lambda g: g / g.norm(dim=0, keepdim=True)),
    "by norm": own(lambda g: g / g.norm()),
    "by blocks": own(by_blocks),
    "rows of large ones alone": own(lambda g: g / g.norm(dim=1, keepdim=True) if g.shape[1] > 128 else g),
}


@pytest.mark.parametrize("name", WHOLE)
def test_optimizers_of_whole_matrices_are_found(name: str) -> None:
    found = needs(WHOLE[name], MATRICES)
    assert {found[each] for each in MATRICES if name != "rows of large ones alone" or MATRICES[each][1] > 128} == {"parameter"}


def test_each_parameter_has_its_own_answer() -> None:
    """Muon for matrices of layers, AdamW for the rest, told apart by name."""

    def both(named: Iterable[tuple[str, nn.Parameter]]) -> list[torch.optim.Optimizer]:
        pairs = list(named)
        matrices = [p for name, p in pairs if name.startswith("layers") and p.ndim == 2]
        return [torch.optim.Muon(matrices), torch.optim.AdamW([p for name, p in pairs if not name.startswith("layers") or p.ndim != 2])]

    found = needs(both, SHAPES)
    assert {name for name, need in found.items() if need == "parameter"} == {"layers.0.w", "layers.1.w"}
    assert {need for name, need in found.items() if not name.endswith(".w")} == {"element"}


def test_one_that_couples_parameters_is_found() -> None:
    assert set(needs(lambda named: ByAllNorms([p for _, p in named], torch.sign), SHAPES).values()) == {"all"}


def test_one_that_keeps_other_shapes_is_taken_for_one_of_wholes() -> None:
    """Its first steps are elementwise; what it keeps says that later ones will not be."""

    class Later(Own):
        @torch.no_grad()
        def step(self, closure: None = None) -> None:  # type: ignore[override]
            for each in (p for group in self.param_groups for p in group["params"] if p.grad is not None):
                self.state[each].setdefault("gram", torch.zeros(each.shape[0], each.shape[0]))
            super().step()

    assert set(needs(lambda named: Later([p for _, p in named], torch.sign), MATRICES).values()) == {"parameter"}


def test_one_that_draws_random_numbers_is_refused() -> None:
    with pytest.raises(LayoutError, match="Own draws random numbers"):
        needs(own(lambda g: g + torch.randn_like(g)), SHAPES)


def test_the_callers_random_numbers_are_left_alone() -> None:
    torch.manual_seed(3)
    expected = torch.randn(2)
    torch.manual_seed(3)
    needs(ELEMENTWISE["AdamW"], SHAPES)
    assert torch.equal(torch.randn(2), expected)


def test_one_that_fails_is_refused_with_its_words() -> None:
    with pytest.raises(LayoutError, match=r"tried on small float64 tensors.*failed: SparseAdam does not support dense"):
        needs(lambda named: torch.optim.SparseAdam([p for _, p in named]), SHAPES)


def named(shapes: dict[str, tuple[int, ...]]) -> list[tuple[str, nn.Parameter]]:
    return [(name, nn.Parameter(torch.zeros(shape))) for name, shape in shapes.items()]


def test_lbfgs_is_refused() -> None:
    with pytest.raises(LayoutError, match=r"LBFGS cannot be used: its step\(\) calls a closure"):
        make_optimizers(lambda pairs: torch.optim.LBFGS([p for _, p in pairs]), named(SHAPES))


@pytest.mark.parametrize(
    ("factory", "match"),
    [
        (lambda pairs: None, "must return a torch.optim.Optimizer or a sequence of them, not NoneType"),
        (lambda pairs: torch.optim.SGD([nn.Parameter(torch.zeros(3))], lr=1.0), r"SGD has a parameter of \[3\] that it was not given"),
        (lambda pairs: [torch.optim.SGD(p, lr=1.0) for p in [list(pairs)] * 2], "embed is in two optimizers"),
    ],
)
def test_what_is_no_optimizer_of_the_parameters_is_refused(factory: OptimizerFactory, match: str) -> None:
    with pytest.raises(LayoutError, match=match):
        make_optimizers(factory, named(SHAPES))


PARTS = {name: (shape[0] // 2, *shape[1:]) if shape else () for name, shape in SHAPES.items()}
BY_SIZE: dict[str, OptimizerFactory] = {
    "lr": lambda pairs: torch.optim.AdamW([{"params": [p], "lr": 1.0 / max(p.shape[:1], default=1)} for _, p in pairs]),
    "group": lambda pairs: torch.optim.AdamW(
        [{"params": [p for p in every if p.numel() > 5000]}, {"params": [p for p in every if p.numel() <= 5000], "lr": 1.0}]
        if (every := [p for _, p in pairs])
        else []
    ),
}


@pytest.mark.parametrize("name", BY_SIZE)
def test_groups_by_size_are_refused_on_parts(name: str) -> None:
    make_on_parts(BY_SIZE[name], SHAPES, named(SHAPES))
    with pytest.raises(LayoutError, match=rf"depend on its size: {name} is .* Take sizes from the model before"):
        make_on_parts(BY_SIZE[name], SHAPES, named(PARTS))


@pytest.mark.parametrize("fused", [None, True])
def test_groups_by_name_and_dims_are_not(fused: bool | None) -> None:
    def factory(pairs: Iterable[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
        every = list(pairs)
        return torch.optim.AdamW(
            [{"params": [p for n, p in every if p.ndim > 1], "weight_decay": 0.1}, {"params": [p for n, p in every if p.ndim < 2]}],
            fused=fused,
        )

    mine = [(name, absent(shape, torch.float32, torch.device("cpu"))) for name, shape in SHAPES.items()]
    (optimizer,) = make_on_parts(factory, SHAPES, mine)
    assert [len(group["params"]) for group in optimizer.param_groups] == [3, 3]
    prefer_fused(optimizer).step()


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.Adam, torch.optim.SGD])
def test_fused_ones_give_the_same_numbers(kind: type[torch.optim.Optimizer]) -> None:
    plain, fused = (nn.Parameter(torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(3, 4)) for _ in range(2))
    optimizers = kind([plain], lr=1e-2), prefer_fused(kind([fused], lr=1e-2))
    assert optimizers[1].param_groups[0]["fused"]
    for seed in range(3):
        gradient = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        plain.grad, fused.grad = gradient.clone(), gradient.clone()
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(fused, plain, rtol=1e-13, atol=1e-15)


def test_what_the_user_chose_is_left_alone() -> None:
    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(2))], lr=1e-2, foreach=True)
    assert not prefer_fused(optimizer).param_groups[0]["fused"]


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("options", [{}, {"amsgrad": True}, {"foreach": True}, {"weight_decay": 0.1}], ids=str)
def test_states_made_early_are_those_of_the_first_step(kind: Any, dtype: torch.dtype, options: dict[str, Any]) -> None:
    """Also for a tensor with another order of strides, in two groups, and of one that gets no gradient."""
    if kind is torch.optim.SGD:
        options = {"momentum": 0.9, "dampening": 0.5}
    values = [torch.randn(3, 4, dtype=dtype), torch.randn(4, 5, dtype=dtype).t(), torch.randn((), dtype=dtype), torch.randn(2, dtype=dtype)]

    def made() -> torch.optim.Optimizer:
        parameters = [nn.Parameter(value.clone(memory_format=torch.preserve_format)) for value in values]
        return prefer_fused(kind([{"params": parameters[:2]}, {"params": parameters[2:], "lr": 0.5}], lr=0.1, **options))

    def step(optimizer: torch.optim.Optimizer, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for parameter in parameters_of(optimizer)[:3]:
            parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=dtype).as_strided(parameter.shape, parameter.stride())
        optimizer.step()

    def parameters_of(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
        return [each for group in optimizer.param_groups for each in group["params"]]

    early, plain = made(), made()
    for parameter in parameters_of(early)[:3]:
        parameter.grad = torch.full_like(parameter, torch.nan)
    make_states(early)
    held = {place: {key: id(value) for key, value in early.state[each].items()} for place, each in enumerate(parameters_of(early)[:3])}
    for seed in range(3):
        step(early, seed)
        step(plain, seed)
        make_states(early)  # what is there stays
    assert len(early.state) == len(plain.state) == 3
    for place, (one, other) in enumerate(zip(parameters_of(early), parameters_of(plain), strict=True)):
        assert torch.equal(one, other)
        kept, expected = early.state.get(one, {}), plain.state.get(other, {})
        assert list(kept) == list(expected)
        for key, value in expected.items():
            assert torch.equal(kept[key], value) and kept[key].dtype == value.dtype and kept[key].stride() == value.stride(), key
            if kind is not torch.optim.SGD:
                assert id(kept[key]) == held[place][key], f"{key} was made again"
