"""The same numbers as one device where that is not a matter of course: steps of small models, in float64, on ranks that are threads."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.clusters import made_up
from torch import Tensor, nn
from torch.nn import functional as F

import shardwise as sw
from shardwise.errors import BatchError, CaptureError, LayoutError, VerifyError
from shardwise.runtime.launch import launch
from shardwise.verify.verify import Report

Batch = dict[str, Tensor]
Example = tuple[nn.Module, Batch]
Make = Callable[[], Example]


class Model(nn.Module):
    """Parts by name (modules, parameters, tensors as buffers), and a function of the model and the batch that makes the loss."""

    def __init__(self, loss: Callable[..., Any], **parts: nn.Module | Tensor | int) -> None:
        super().__init__()
        self.loss = loss
        for name, part in parts.items():
            if isinstance(part, Tensor) and not isinstance(part, nn.Parameter):
                self.register_buffer(name, part)
            else:
                setattr(self, name, part)

    def forward(self, **batch: Tensor) -> Any:
        return self.loss(self, **batch)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def batch(samples: int = 8, inputs: int = 16, outputs: int = 8) -> Batch:
    return {"x": torch.randn(samples, inputs), "y": torch.randn(samples, outputs)}


def verified(example: Example, layout: str, ranks: int = 2, dtype: torch.dtype = torch.float64) -> Report:
    """Verified to be equal."""
    report = sw.verify(*example, cluster=made_up(ranks), layout=layout, dtype=dtype, processes=False)
    assert isinstance(report, Report)
    assert report.ok, f"{report.first_difference}\n{report}"
    return report


def compared(report: Report) -> set[str]:
    return {each.name for each in report.differences}


# -- losses that couple samples -----------------------------------------------------------------------------------------------------------


def contrastive() -> Example:
    def loss(model: Any, x: Tensor, y: Tensor) -> Tensor:
        first, second = F.normalize(model.left(x), dim=1), F.normalize(model.right(y), dim=1)
        scores = first @ second.t() / 0.1
        return F.cross_entropy(scores, torch.arange(len(x))) + F.cross_entropy(scores.t(), torch.arange(len(x)))

    return Model(loss, left=nn.Linear(16, 12), right=nn.Linear(8, 12)), batch()


def batch_normalised() -> Example:
    net = nn.Sequential(nn.Linear(16, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 8))
    return Model(lambda model, x, y: F.mse_loss(model.net(x), y), net=net), batch()


def routed() -> Example:
    """The load-balancing loss of Switch Transformers (Fedus et al., 2021): experts · Σ share of tokens · mean probability."""

    def loss(model: Any, x: Tensor, y: Tensor) -> Tensor:
        probabilities = model.router(x).softmax(-1)
        best, chosen = probabilities.max(-1)
        experts = torch.stack([each(x) for each in model.experts])
        out = experts[chosen, torch.arange(len(x))] * best[:, None]
        share = F.one_hot(chosen, 4).to(x.dtype).mean(0)
        return F.mse_loss(out, y) + 0.1 * 4 * (share * probabilities.mean(0)).sum()

    return Model(loss, router=nn.Linear(16, 4), experts=nn.ModuleList(nn.Linear(16, 8) for _ in range(4))), batch()


COUPLED: dict[str, Make] = {"InfoNCE": contrastive, "BatchNorm": batch_normalised, "router balance": routed}


@pytest.mark.parametrize("name", COUPLED)
def test_losses_that_couple_samples_are_exact_over_dp(name: str) -> None:
    report = verified(COUPLED[name](), "dp=2")
    assert report.plan.microbatches == 1


@pytest.mark.parametrize("name", COUPLED)
def test_losses_that_couple_samples_have_one_microbatch(name: str) -> None:
    with pytest.raises(LayoutError, match=r"microbatches=2 would change the numbers: .*; use microbatches=1$"):
        sw.verify(*COUPLED[name](), cluster=made_up(1), layout="microbatches=2", processes=False)


@pytest.mark.parametrize("layout", ["dp=2,microbatches=2", "pp=2,microbatches=4", "tp=2,microbatches=2"])
def test_a_mean_over_valid_tokens_is_one_over_all_of_them(layout: str) -> None:
    def loss(model: Any, ids: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(model.head(model.mix(model.embed(ids)).relu()).flatten(0, 1), labels.flatten(), ignore_index=-1)

    model = Model(loss, embed=nn.Embedding(32, 16), mix=nn.Linear(16, 16), head=nn.Linear(16, 32))
    labels = torch.randint(32, (8, 12))
    for sample, valid in enumerate((12, 0, 1, 12, 7, 0, 0, 3)):
        labels[sample, valid:] = -1
    verified((model, {"ids": torch.randint(32, (8, 12)), "labels": labels}), layout)


# -- buffers ------------------------------------------------------------------------------------------------------------------------------


def moving_average() -> Example:
    """Whose average, counter and last maximum change under no_grad, and are not read again."""

    def loss(model: Any, x: Tensor, y: Tensor) -> Tensor:
        hidden = model.up(x)
        with torch.no_grad():
            model.average.mul_(0.9).add_(hidden.mean(0), alpha=0.1)
            model.highest.copy_(hidden.amax(0))
            model.count += 1
        return F.mse_loss(model.down(hidden.relu()), y)

    buffers = {"average": torch.zeros(32), "highest": torch.zeros(32), "count": torch.tensor(3)}
    return Model(loss, up=nn.Linear(16, 32), down=nn.Linear(32, 8), **buffers), batch()


def read_and_updated() -> Example:
    """Its gradient is made of what the buffer was before the step."""

    def loss(model: Any, x: Tensor, y: Tensor) -> Tensor:
        hidden = model.up(x)
        scaled = hidden * model.scale.clone()
        with torch.no_grad():
            model.scale.mul_(0.5).add_(hidden.abs().mean(0))
        return F.mse_loss(model.down(scaled.tanh()), y)

    return Model(loss, up=nn.Linear(16, 32), down=nn.Linear(32, 8), scale=torch.rand(32) + 0.5), batch()


@pytest.mark.parametrize(("make", "buffers"), [(moving_average, {"average", "highest", "count"}), (read_and_updated, {"scale"})])
@pytest.mark.parametrize("layout", ["dp=2", "tp=2", "pp=2"])
def test_buffers_that_change_are_equal_afterwards(make: Make, buffers: set[str], layout: str) -> None:
    """What reads a buffer is in the stage of what changes it: another rank's copy would stay as it was."""
    assert {f"buffer {name}" for name in buffers} <= compared(verified(make(), layout))


def timed() -> Example:
    """Which multiplies what it makes of nothing with what the batch says."""

    def loss(model: Any, x: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(model.down(model.up(x * (torch.ones(8, 1) * y[:, :1])).relu()), y)

    return Model(loss, up=nn.Linear(16, 32), down=nn.Linear(32, 8)), batch()


@pytest.mark.parametrize("processes", [False, True])
def test_what_a_step_leaves_behind_is_seen(processes: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step that writes over what is computed once is right, the next one is not."""
    assert "loss after the step" in compared(verified(timed(), "dp=2"))
    monkeypatch.setattr("shardwise.runtime.graphs.into_fresh_memory", lambda target: target)
    found = sw.verify(*timed(), cluster=made_up(2), layout="dp=2", processes=processes)
    assert isinstance(found, Report) and found.first_difference == "loss after the step"


def test_a_buffer_of_all_samples_allows_one_microbatch() -> None:
    with pytest.raises(LayoutError, match=r"microbatches=2 would change the numbers"):
        sw.verify(*moving_average(), cluster=made_up(1), layout="microbatches=2", processes=False)


# -- parameters ---------------------------------------------------------------------------------------------------------------------------


def tied() -> Example:
    """The embedding is the head, too."""

    def loss(model: Any, ids: Tensor) -> Tensor:
        hidden = model.second(model.first(model.embed(ids)).relu())
        return F.cross_entropy(F.linear(hidden, model.embed.weight).flatten(0, 1), ids.roll(1, 1).flatten())

    model = Model(loss, embed=nn.Embedding(32, 16), first=nn.Linear(16, 16), second=nn.Linear(16, 16))
    return model, {"ids": torch.randint(32, (8, 6))}


def repeated() -> Example:
    """One layer three times, its weight once more transposed."""

    def loss(model: Any, x: Tensor, y: Tensor) -> Tensor:
        for _ in range(3):
            x = x + model.layer(x).tanh()
        return F.mse_loss(model.head(x @ model.layer.weight), y)

    return Model(loss, layer=nn.Linear(16, 16), head=nn.Linear(16, 8)), batch()


def partly_frozen() -> Example:
    net = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 8))
    net[2].requires_grad_(False)
    return Model(lambda model, x, y: F.mse_loss(model.net(x), y), net=net), batch()


@pytest.mark.parametrize("layout", ["pp=2", "pp=2,microbatches=4", "tp=2", "dp=2,microbatches=2"])
@pytest.mark.parametrize("make", [tied, repeated, partly_frozen])
def test_parameters_read_often_or_frozen(make: Make, layout: str) -> None:
    trained = {f"gradient of {name}" for name, parameter in make()[0].named_parameters() if parameter.requires_grad}
    assert {name for name in compared(verified(make(), layout)) if name.startswith("gradient of ")} == trained


def neglected() -> Example:
    """One parameter is not used, one only behind a detach, one where its gradient is zero."""

    def loss(model: Any, x: Tensor, y: Tensor) -> Tensor:
        hidden = model.up(x) + (x @ model.behind).detach()
        return F.mse_loss(model.down(hidden.relu()), y) + 0 * model.zero.sum()

    alone = {name: nn.Parameter(torch.randn(16, 32)) for name in ("unused", "behind", "zero")}
    return Model(loss, up=nn.Linear(16, 32), down=nn.Linear(32, 8), **alone), batch()


@pytest.mark.parametrize("layout", ["tp=2", "dp=2", "pp=2"])
def test_a_parameter_without_gradient_has_none(layout: str) -> None:
    found = compared(verified(neglected(), layout))
    assert "gradient of zero" in found and not {"gradient of unused", "gradient of behind"} & found


def plain_adamw(example: Example, steps: int) -> dict[str, Tensor]:
    model, batch = example
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    for _ in range(steps):
        optimizer.zero_grad()
        model(**batch).backward()
        optimizer.step()
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def trained_in_a_job(steps: int) -> dict[str, Tensor]:
    """On each rank."""
    torch.manual_seed(0)
    model, batch = neglected()
    plan = sw.plan(model, batch, made_up(2), "dp=2")
    assert isinstance(plan, sw.Plan)

    def adamw(named: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW([parameter for _, parameter in named], lr=0.1, weight_decay=0.5)

    job = sw.parallelize(model, batch, plan=plan, optimizer=adamw)
    for _ in range(steps):
        job.step(batch)
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@pytest.mark.distributed
def test_weight_decay_leaves_a_parameter_without_gradient_alone() -> None:
    """As torch's AdamW leaves those alone whose `.grad` is None, but not one whose gradient is zero."""
    expected = plain_adamw(neglected(), 3)
    torch.manual_seed(0)
    before = {name: parameter.detach() for name, parameter in neglected()[0].named_parameters()}
    for found in launch(trained_in_a_job, (3,), ranks=2, timeout_s=60.0):
        assert found.keys() == expected.keys()
        for name, parameter in found.items():
            torch.testing.assert_close(parameter, expected[name], rtol=1e-4, atol=1e-5)
        assert all(torch.equal(found[name], before[name]) for name in ("unused", "behind"))
        assert found["zero"].norm() < 0.9 * before["zero"].norm()


# -- tensors ------------------------------------------------------------------------------------------------------------------------------


def transposed_inputs() -> Example:
    model = Model(
        lambda model, x, y: F.mse_loss(model.net(x.flatten(1)), y), net=nn.Sequential(nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 8))
    )
    return model, {"x": torch.randn(4, 8, 16)[:, :, ::2].transpose(0, 1), "y": torch.randn(8, 8).t()}


def channels_last() -> Example:
    net = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 1)).to(memory_format=torch.channels_last)
    x = torch.randn(4, 4, 6, 6).to(memory_format=torch.channels_last)
    return Model(lambda model, x, y: F.cross_entropy(model.net(x), y), net=net), {"x": x, "y": torch.randint(4, (4, 6, 6))}


def half_precision() -> Example:
    """Weights in bfloat16, the norm and the loss in float32."""

    def loss(model: Any, x: Tensor, y: Tensor) -> Tensor:
        hidden = model.up(x.to(torch.bfloat16))
        wide = hidden.float()
        hidden = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)).to(torch.bfloat16)
        return F.mse_loss(model.down(hidden.relu()).float(), y)

    return Model(loss, up=nn.Linear(16, 32, dtype=torch.bfloat16), down=nn.Linear(32, 8, dtype=torch.bfloat16)), batch()


def integers_and_masks() -> Example:
    def loss(model: Any, ids: Tensor, small: Tensor, mask: Tensor, y: Tensor) -> Tensor:
        hidden = model.embed(ids) * mask[..., None] + small[..., None] / 7
        pooled = hidden.masked_fill(~mask[..., None], -1e4).amax(1) + hidden.sum(1) / mask.sum(1, keepdim=True).clamp_min(1)
        return F.mse_loss(model.head(pooled), y)

    mask = torch.rand(8, 6) < 0.6
    inputs = {"ids": torch.randint(32, (8, 6)), "small": torch.randint(-9, 9, (8, 6), dtype=torch.int8), "mask": mask}
    return Model(loss, embed=nn.Embedding(32, 16), head=nn.Linear(16, 8)), inputs | {"y": torch.randn(8, 8)}


def spectral() -> Example:
    """A filter of complex numbers on the frequencies."""

    def loss(model: Any, x: Tensor, y: Tensor) -> Tensor:
        filtered = torch.fft.irfft(torch.fft.rfft(x) * model.filter, n=16)
        return F.mse_loss(model.head(filtered), y)

    return Model(loss, filter=nn.Parameter(torch.randn(9, dtype=torch.complex64)), head=nn.Linear(16, 8)), batch()


TENSORS: dict[str, Make] = {
    "not contiguous": transposed_inputs,
    "channels last": channels_last,
    "bfloat16": half_precision,
    "integers and masks": integers_and_masks,
    "complex numbers": spectral,
}


@pytest.mark.parametrize("layout", ["tp=2", "dp=2,microbatches=2", "pp=2"])
@pytest.mark.parametrize("name", TENSORS)
def test_kinds_of_tensors(name: str, layout: str) -> None:
    verified(TENSORS[name](), layout)


def test_bfloat16_in_float32() -> None:
    verified(half_precision(), "tp=2", dtype=torch.float32)


# -- dims that the ranks do not divide ----------------------------------------------------------------------------------------------------


def attention(heads: int) -> Example:
    def loss(model: Any, x: Tensor, y: Tensor) -> Tensor:
        q, k, v = model.qkv(x).unflatten(-1, (3, heads, 4)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(-2)
        return F.mse_loss(x + model.out(attended), y)

    model = Model(loss, qkv=nn.Linear(16, 12 * heads), out=nn.Linear(4 * heads, 16))
    return model, {"x": torch.randn(4, 6, 16), "y": torch.randn(4, 6, 16)}


def language(words: int) -> Example:
    def loss(model: Any, ids: Tensor) -> Tensor:
        return F.cross_entropy(model.head(model.mix(model.embed(ids)).relu()).flatten(0, 1), ids.roll(1, 1).flatten())

    ids = torch.randint(words, (4, 6))
    return Model(loss, embed=nn.Embedding(words, 16), mix=nn.Linear(16, 16), head=nn.Linear(16, words)), {"ids": ids}


def dropping(width: int) -> Example:
    """Masks of a dim of which ranks hold parts that begin anywhere, and noise for all samples."""

    def loss(model: Any, x: Tensor, y: Tensor) -> Tensor:
        hidden = F.dropout(model.up(x), 0.4) + 0.1 * torch.randn(width)
        return F.mse_loss(F.dropout(model.down(hidden.tanh()), 0.2), y)

    return Model(loss, up=nn.Linear(16, width), down=nn.Linear(width, 8)), batch()


def experts(count: int) -> Example:
    """Each expert for all tokens, weighted."""

    def loss(model: Any, x: Tensor, y: Tensor) -> Tensor:
        hidden = torch.einsum("bi,eio->beo", x, model.weight).relu()
        return F.mse_loss((hidden * model.router(x).softmax(-1)[..., None]).sum(1), y)

    return Model(loss, router=nn.Linear(16, count), weight=nn.Parameter(torch.randn(count, 16, 8) / 4)), batch()


@pytest.mark.parametrize(
    ("make", "ranks"),
    [
        pytest.param(lambda: attention(2), 4, id="2 heads on 4 ranks"),
        pytest.param(lambda: attention(6), 4, id="6 heads on 4 ranks"),
        pytest.param(lambda: attention(3), 2, id="3 heads on 2 ranks"),
        pytest.param(lambda: experts(1), 2, id="1 expert on 2 ranks"),
        pytest.param(lambda: experts(3), 4, id="3 experts on 4 ranks"),
        pytest.param(lambda: language(131), 2, id="131 words on 2 ranks"),
        pytest.param(lambda: language(131), 4, id="131 words on 4 ranks"),
    ],
)
def test_dims_that_the_ranks_do_not_divide(make: Make, ranks: int) -> None:
    verified(make(), f"tp={ranks}", ranks)


@pytest.mark.parametrize(("layout", "ranks"), [("tp=2", 2), ("tp=4", 4), ("dp=2,tp=2,microbatches=2", 4)])
@pytest.mark.parametrize("width", [30, 131])
def test_dropout_where_parts_begin_anywhere(width: int, layout: str, ranks: int) -> None:
    verified(dropping(width), layout, ranks)


@pytest.mark.parametrize("ranks", [2, 4])
def test_an_odd_vocabulary_is_split_unevenly(ranks: int) -> None:
    plan = verified(language(131), f"tp={ranks}", ranks).plan
    assert plan.parameters["embed.weight"].startswith("S(") and plan.parameters["head.weight"] == "S(0)"


@pytest.mark.parametrize(
    ("layout", "ranks", "reason"),
    [
        ("dp=4", 4, r"a batch of 2 cannot be split over dp=4; change the global batch or dp"),
        ("dp=2,microbatches=2", 2, r"a batch of 2 cannot be cut into microbatches=2 on dp=2: 2 is no multiple of 4"),
    ],
)
def test_a_batch_smaller_than_its_parts_is_refused(layout: str, ranks: int, reason: str) -> None:
    model, whole = tied()
    small = {name: tensor[:2] for name, tensor in whole.items()}
    with pytest.raises(BatchError, match=reason):
        sw.verify(model, small, cluster=made_up(ranks), layout=layout, processes=False)


# -- code of the user's -------------------------------------------------------------------------------------------------------------------


class Clipped(torch.autograd.Function):
    """Whose gradient is not the derivative of what it computes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.clamp(-1, 1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        return gradient * torch.exp(-x.abs())


@torch.library.custom_op("numerics::softsign", mutates_args=())
def softsign(x: Tensor) -> Tensor:
    return x / (1 + x.abs())


@softsign.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def _softsign_gradient(ctx: Any, gradient: Tensor) -> Tensor:
    (x,) = ctx.saved_tensors
    return gradient / (1 + x.abs()).square()


softsign.register_autograd(_softsign_gradient, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs))


@pytest.mark.parametrize("layout", ["tp=2", "dp=2", "pp=2"])
@pytest.mark.parametrize("function", [Clipped.apply, softsign], ids=["autograd function", "operator"])
def test_functions_of_the_users(function: Callable[[Tensor], Tensor], layout: str) -> None:
    def loss(model: Any, x: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(model.down(function(model.up(x))), y)

    verified((Model(loss, up=nn.Linear(16, 32), down=nn.Linear(32, 8)), batch()), layout)


class Shaky(nn.Module):
    """Multiplies by Python's own random number."""

    def forward(self, x: Tensor) -> Tensor:
        return x * random.random()


class Counting(nn.Module):
    """Multiplies by the number of its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x * self.calls


@pytest.mark.parametrize("kind", [Shaky, Counting])
def test_a_model_that_is_not_deterministic_is_refused(kind: type[nn.Module]) -> None:
    net = nn.Sequential(nn.Linear(16, 32), nn.Sequential(nn.ReLU(), kind()), nn.Linear(32, 8))
    model = Model(lambda model, x, y: F.mse_loss(model.net(x), y), net=net)
    with pytest.raises(VerifyError, match=r"Model is not deterministic.* submodule that gave another result is net\.1\.1\. "):
        sw.verify(model, batch(), cluster=made_up(2), layout="dp=2", processes=False)


@pytest.mark.parametrize(
    ("output", "named"),
    [(lambda out: out, r"a tensor of shape \[8, 8\]"), (lambda out: (out, out), "tuple"), (lambda out: {"logits": out}, "dict")],
)
def test_an_output_that_is_no_loss_says_how_to_give_one(output: Callable[[Tensor], Any], named: str) -> None:
    model = Model(lambda model, x: output(model.layer(x)), layer=nn.Linear(16, 8))
    with pytest.raises(CaptureError, match=rf"Model returns {named}, not a scalar loss; put labels into the batch or pass loss=callable"):
        sw.verify(model, {"x": torch.randn(8, 16)}, cluster=made_up(2), layout="dp=2", processes=False)


def test_a_loss_given_as_a_function() -> None:
    model = Model(lambda model, x: model.layer(x), layer=nn.Linear(16, 8))
    report = sw.verify(
        model,
        {"x": torch.randn(8, 16)},
        cluster=made_up(2),
        layout="dp=2",
        processes=False,
        loss=lambda out: out.square().mean() / math.sqrt(2),
    )
    assert isinstance(report, Report) and report.ok
