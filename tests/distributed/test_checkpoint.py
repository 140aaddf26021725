"""Checkpoints of jobs on real ranks, in float64: what goes on from one is what was not interrupted, in any layout."""

from __future__ import annotations

import functools
import json
import os
import resource
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from tests.clusters import made_up
from torch import Tensor, nn
from torch.nn import functional as F

import shardwise as sw
from shardwise.checkpoint.safetensors import Entry
from shardwise.data import Loader
from shardwise.errors import DataError, RankFailed, ShardwiseError, WeightsError
from shardwise.planner.layout import Layout
from shardwise.runtime.launch import launch

pytestmark = pytest.mark.distributed


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(3 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + F.dropout(self.down(F.gelu(self.up(self.norm(x)))), 0.2, self.training)


class Net(nn.Module):
    """A table that is the head, too, buffers that training changes, dropout, a frozen parameter and one that no operator reads."""

    def __init__(self, width: int = 12, layers: int = 2) -> None:
        super().__init__()
        self.embed, self.layers, self.batch = (
            nn.Embedding(30, width),
            nn.ModuleList(Block(width) for _ in range(layers)),
            nn.BatchNorm1d(width),
        )
        self.head = nn.Linear(width, 30)
        self.head.weight = self.embed.weight
        self.unread = nn.Parameter(torch.randn(3))
        self.layers[0].norm.weight.requires_grad = False

    def forward(self, tokens: Tensor, y: Tensor) -> Tensor:
        hidden = self.embed(tokens)
        for layer in self.layers:
            hidden = layer(hidden)
        return F.cross_entropy(self.head(self.batch(hidden.flatten(0, 1))), y.flatten())


def net(width: int = 12, layers: int = 2) -> nn.Module:
    torch.manual_seed(0)
    return Net(width, layers).double()


DATA = [
    {"tokens": torch.randint(30, (5,), generator=generator), "y": torch.randint(30, (5,), generator=generator)}
    for generator in [torch.Generator().manual_seed(2)]
    for _ in range(27)
]
EXAMPLE = {name: torch.stack([sample[name] for sample in DATA[:8]]) for name in DATA[0]}


def adamw(pairs: Any) -> torch.optim.Optimizer:
    every = dict(pairs)
    groups = [{"params": [p for p in every.values() if p.ndim > 1]}, {"params": [p for p in every.values() if p.ndim < 2], "lr": 1e-3}]
    return torch.optim.AdamW(groups, lr=1e-2)


def adafactor(pairs: Any) -> torch.optim.Optimizer:
    return torch.optim.Adafactor([p for _, p in pairs], lr=1e-2)


def sgd(pairs: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for _, p in pairs], lr=1e-2)


def planned(layout: str, model: nn.Module | None = None, precision: Any = "float32") -> sw.Plan:
    plan = sw.plan(model or net(), EXAMPLE, made_up(Layout.parse(layout).ranks), layout, precision=precision)
    assert isinstance(plan, sw.Plan), str(plan)
    return plan


def trained(plan: sw.Plan, optimizer: Any, *, load: Path | None = None, save: Path | None = None, single: bool = False) -> dict[str, Any]:
    """Three steps, saved, then three more; or the three more from a checkpoint. 27 samples by 8 are 3 batches an epoch."""
    model = net().float() if single else net()
    job = sw.parallelize(model, EXAMPLE, plan=plan, optimizer=optimizer, seed=5 if load is None else 99)
    loader = Loader(DATA, 8, part=job.batch_slice, seed=1)
    batches = loader.forever()
    schedule = torch.optim.lr_scheduler.ExponentialLR(job.optimizer, 0.5)
    if load is not None:
        job.load(load, loader=loader, schedule=schedule)
    else:
        for _ in range(4):
            job.step(next(batches), local=True)
            schedule.step()
    if save is not None:
        job.save(save, loader=loader, schedule=schedule)
    losses = []
    for _ in range(3):
        losses.append(job.step(next(batches), local=True))
        schedule.step()
    return {"losses": losses, "state": job.state_dict()}


def run(layout: str, optimizer: Any = adamw, **how: Any) -> dict[str, Any]:
    plan = planned(layout)
    ranks: list[dict[str, Any]] = launch(_trained, (plan, optimizer, how), ranks=plan.ranks, threads=1)
    assert all(rank["losses"] == ranks[0]["losses"] for rank in ranks)
    return ranks[0]


def _trained(plan: sw.Plan, optimizer: Any, how: dict[str, Any]) -> dict[str, Any]:
    return trained(plan, optimizer, **how)


def tensors(state: dict[str, Any]) -> dict[str, Any]:
    kept = {f"{name}.{key}": value for name, each in state["optimizer"]["state"].items() for key, value in each.items()}
    return state["model"] | kept


def assert_close(one: dict[str, Any], other: dict[str, Any], bound: float) -> None:
    assert one["losses"] == (pytest.approx(other["losses"], rel=bound) if bound else other["losses"])
    assert one["state"]["optimizer"]["groups"] == other["state"]["optimizer"]["groups"]
    assert (one["state"]["steps"], one["state"]["seed"]) == (other["state"]["steps"], other["state"]["seed"]) == (7, 5)
    found, wanted = tensors(one["state"]), tensors(other["state"])
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        if isinstance(value, Tensor) and bound:
            torch.testing.assert_close(found[name], value, rtol=bound, atol=bound, msg=name)
        else:
            assert torch.equal(torch.as_tensor(found[name]), torch.as_tensor(value)), name


ONE = "dp=1,tp=1,pp=1,microbatches=1"
LAYOUTS = [ONE, "tp=2,microbatches=1", "dp=2,zero=3,microbatches=1", "pp=2,microbatches=1", "dp=2,tp=2,zero=1,microbatches=1"]


Saved = Callable[[str], tuple[Path, dict[str, Any]]]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """Layout → its checkpoint, and the run that went on without being interrupted; each made once."""
    folder = tmp_path_factory.mktemp("checkpoints")
    return functools.cache(lambda layout: (folder / layout, run(layout, save=folder / layout)))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_same_layout_goes_on_bit_by_bit(layout: str, saved: Saved) -> None:
    folder, whole = saved(layout)
    assert_close(run(layout, load=folder), whole, 0.0)


@pytest.mark.parametrize("number", range(len(LAYOUTS)))
def test_another_layout_goes_on_like_one_device(number: int, saved: Saved) -> None:
    folder, _ = saved(LAYOUTS[number])
    assert_close(run(LAYOUTS[number - 1], load=folder), saved(ONE)[1], 1e-9)


@pytest.mark.parametrize(("first", "second"), [("tp=2,microbatches=1", "dp=2,zero=1,microbatches=1"), (ONE, "tp=2,microbatches=1")])
def test_optimizers_of_whole_matrices(first: str, second: str, tmp_path: Path) -> None:
    """Adafactor keeps sums over rows and columns, on the ranks that own a parameter."""
    whole = run(first, adafactor, save=tmp_path / "checkpoint")
    assert_close(run(first, adafactor, load=tmp_path / "checkpoint"), whole, 0.0)
    assert_close(run(second, adafactor, load=tmp_path / "checkpoint"), whole, 1e-9)


@pytest.mark.parametrize("layout", ["dp=2,zero=1,microbatches=1", "dp=2,zero=3,microbatches=1"])
def test_what_is_trained_in_16_bits_is_saved_in_32(layout: str, tmp_path: Path) -> None:
    plan = planned(layout, net().float(), "bf16")
    whole = launch(trained_in_16, (plan, {"save": tmp_path / "run"}), ranks=2, threads=1)[0]
    assert_close(launch(trained_in_16, (plan, {"load": tmp_path / "run"}), ranks=2, threads=1)[0], whole, 0.0)
    (file,) = (tmp_path / "run").glob("*.safetensors")
    found = load_file(file)
    assert {found[name].dtype for name, each in net().named_parameters() if each.requires_grad} == {torch.float32}


def trained_in_16(plan: sw.Plan, how: dict[str, Any]) -> dict[str, Any]:
    return trained(plan, adamw, single=True, **how)


def test_the_files_are_what_others_read(saved: Saved) -> None:
    """Whole tensors under the model's names; the same, to rounding, whatever layout wrote them."""
    contents = {}
    for layout in LAYOUTS[:3]:
        folder = saved(layout)[0]
        (file,) = folder.glob("*.safetensors")
        assert json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"].keys() == load_file(file).keys()
        contents[layout] = load_file(file)
    model = net()
    lacking, more = model.load_state_dict(contents[ONE], strict=False)
    assert lacking == ["head.weight"] and not more, "tied names once"
    for layout, found in contents.items():
        for name, tensor in contents[ONE].items():
            torch.testing.assert_close(found[name], tensor, rtol=1e-9, atol=1e-9, msg=f"{name} {layout}")
    assert not list(folder.parent.glob(".*")), "no drafts are left"
    plan = planned("tp=2,microbatches=1")
    assert launch(begun_with, (plan, saved(ONE)[0]), ranks=2, threads=1)[0] == pytest.approx(model.eval()(**EXAMPLE).item(), rel=1e-9)


def begun_with(plan: sw.Plan, folder: Path) -> float:
    loss: float = sw.parallelize(net(), EXAMPLE, plan=plan, optimizer=sgd, weights=folder).eval(EXAMPLE)
    return loss


# -- what goes wrong -----------------------------------------------------------------------------------------------------------------------


class At:
    def __init__(self, place: Any) -> None:
        self.place = place

    def state_dict(self) -> dict[str, Any]:
        return {"place": self.place}

    def load_state_dict(self, state: Any) -> None:
        self.place = state["place"]


def message(work: Callable[[], Any]) -> str:
    try:
        work()
    except ShardwiseError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was wrong"


def without(folder: Path, index: str, name: str, copy: Path) -> Path:
    """A copy whose index lacks the tensor."""
    shutil.copytree(folder, copy)
    found = json.loads((copy / index).read_text())
    del found["weight_map"][name]
    (copy / index).write_text(json.dumps(found))
    return copy


def refused(plans: dict[str, sw.Plan], folder: Path, elsewhere: Path) -> list[str]:
    rank = dist.get_rank()
    job = sw.parallelize(net(), EXAMPLE, plan=plans["same"], optimizer=adamw)
    wide = sw.parallelize(net(width=14), EXAMPLE, plan=plans["wide"], optimizer=adamw)
    deep = sw.parallelize(net(layers=3), EXAMPLE, plan=plans["deep"], optimizer=adamw)
    plain = sw.parallelize(net(), EXAMPLE, plan=plans["same"], optimizer=sgd)
    (elsewhere / "notes").mkdir(exist_ok=True)
    (elsewhere / "notes" / "text.txt").write_text("mine")
    found = [
        message(lambda: wide.load(folder)),
        message(lambda: deep.load(folder)),
        message(lambda: plain.load(folder)),
        message(lambda: job.load(elsewhere)),
        message(lambda: job.load(elsewhere / "lacks bias")),
        message(lambda: job.load(elsewhere / "lacks state")),
        message(lambda: job.load(folder, cursor=At(1))),
        message(lambda: job.load(folder, loader=Loader(DATA, 8, part=job.batch_slice, seed=2))),
        message(lambda: job.save(elsewhere / "notes")),
        message(lambda: job.save(elsewhere / "new", cursor=At(rank))),
        message(lambda: job.save(elsewhere / "new", cursor=At({"mask": [torch.ones(2)]}))),
        message(lambda: job.save(elsewhere / "new", cursor=At({3: 1}))),
    ]
    if rank == 1:  # the file system takes nothing of what this rank writes
        resource.setrlimit(resource.RLIMIT_FSIZE, (64, resource.RLIM_INFINITY))
    found.append(message(lambda: job.save(folder)))
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    job.load(folder)
    return [*found, str(job.steps)]


def test_what_does_not_fit_is_named_on_every_rank(saved: Saved, tmp_path: Path) -> None:
    layout = "tp=2,microbatches=1"
    plans = {"same": planned(layout), "wide": planned(layout, net(width=14)), "deep": planned(layout, net(layers=3))}
    folder = saved(layout)[0]
    without(folder, "model.safetensors.index.json", "batch.bias", tmp_path / "lacks bias")
    state = "state.layers.1.up.bias.exp_avg"
    without(folder / "optimizer", "optimizer.safetensors.index.json", state, tmp_path / "lacks state" / "optimizer")
    shutil.copytree(folder, tmp_path / "lacks state", dirs_exist_ok=True, ignore=lambda _, names: {"optimizer"} & {*names})
    one, other = launch(refused, (plans, folder, tmp_path), ranks=2, threads=1)
    assert one == other
    expected = [
        (WeightsError, r"embed.weight in .* is float64 \[30, 12\], embed.weight of the model is float64 \[30, 14\]; build the model with"),
        (WeightsError, r"lacks layers\.2\.norm\.weight, layers\.2\.norm\.bias, layers\.2\.up\.weight and 3 more"),
        (WeightsError, r"is of AdamW, the job has SGD.*as weights="),
        (WeightsError, r"there is no checkpoint in .*job\.save"),
        (WeightsError, r"lacks batch\.bias; name them as"),
        (WeightsError, r"lacks state\.layers\.1\.up\.bias\.exp_avg: it is not as it was written"),
        (WeightsError, r"has no cursor; beside the job it has loader, schedule: save with cursor="),
        (DataError, r"taken with seed=1, here seed=2"),
        (WeightsError, r"notes is there and is no checkpoint"),
        (WeightsError, r"rank 1's cursor is at another place than rank 0's"),
        (WeightsError, r"cursor\.place\.mask\[0\] is a Tensor; .*\.tolist\(\)"),
        (WeightsError, r"cursor\.place has the key 3, a int"),
        (WeightsError, r"File too large \(rank 1 of 2\)"),
    ]
    for text, (kind, pattern) in zip(one, expected, strict=False):
        with pytest.raises(kind, match=pattern):
            raise kind(text.removeprefix(f"{kind.__name__}: "))
    assert one[-1] == "4", "the last good one is as it was"
    assert (tmp_path / "notes" / "text.txt").read_text() == "mine"


def killed(plan: sw.Plan, folder: Path) -> None:
    """Saves after one step, then dies while it saves again."""
    job = sw.parallelize(net(), EXAMPLE, plan=plan, optimizer=adamw)
    job.step(EXAMPLE)
    job.save(folder, cursor=At(1))
    job.step(EXAMPLE)
    write = Entry.write
    written = []

    def dying(self: Entry, *arguments: Any) -> None:
        write(self, *arguments)
        written.append(self)
        if dist.get_rank() == 1 and len(written) == 3:
            os.kill(os.getpid(), signal.SIGKILL)

    Entry.write = dying  # type: ignore[method-assign]  # this rank's own process
    job.save(folder, cursor=At(2))


def loaded(plan: sw.Plan, folder: Path) -> tuple[int, int]:
    job, cursor = sw.parallelize(net(), EXAMPLE, plan=plan, optimizer=adamw), At(0)
    job.load(folder, cursor=cursor)
    return job.steps, cursor.place


def again(plan: sw.Plan, folder: Path) -> None:
    job = sw.parallelize(net(), EXAMPLE, plan=plan, optimizer=adamw)
    job.load(folder)
    job.step(EXAMPLE)
    job.save(folder, cursor=At(7))


def test_an_interrupted_save_leaves_the_last_good_one(tmp_path: Path) -> None:
    plan, folder = planned("tp=2,microbatches=1"), tmp_path / "run"
    with pytest.raises(RankFailed, match="SIGKILL"):
        launch(killed, (plan, folder), ranks=2, threads=1)
    assert (tmp_path / ".run.draft").is_dir(), "it died while it wrote"
    assert launch(loaded, (plan, folder), ranks=2, threads=1) == [(1, 1)] * 2
    folder.rename(tmp_path / ".run.previous")  # as between the two renames at the end of a save
    assert launch(loaded, (plan, folder), ranks=2, threads=1) == [(1, 1)] * 2
    launch(again, (plan, folder), ranks=2, threads=1)
    assert launch(loaded, (plan, folder), ranks=2, threads=1) == [(2, 7)] * 2
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
