"""Stage graphs compiled by torch's inductor, region by region.

A region is a run of calls of one block of the model between calls that stay as they are:

    forward   [norm, product, …] all_gather [product, gelu, …] all_reduce [add]        […] compiled, equal ones once

Messages, random numbers and the model's own code are operators of ours that no compiler looks into; rows at their experts, of which there
are as many as the router decides, have no one shape to compile for; gradients are written straight into their buffers by torch's products;
sums whose order would depend on threads stay torch's, so that results are equal bit by bit from run to run. What the compiler fails on runs
as it is, and is said.
"""

from __future__ import annotations

import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from shardwise._torch import compiled_by_inductor, missing_compiler
from shardwise.capture.blocks import list_member
from shardwise.cost.operators import MATMULS, is_view, name_of
from shardwise.errors import ClusterError, ShardwiseWarning
from shardwise.program.trace import describe
from shardwise.runtime.graphs import Function, callable_of
from shardwise.runtime.progress import CompilingDisplay

__all__ = ["Compiler", "Region"]

_OURS = "operators of shardwise's (messages, random numbers, code kept whole)"
_BUFFER = "gradients written into their buffers"
_ORDER = "sums whose order depends on threads"
_ROWS = "rows at their experts, whose number changes"
_FEW = "nothing to fuse"

_SUMS = frozenset({"embedding_dense_backward", "index_put", "_unsafe_index_put", "index_add", "scatter_add", "scatter_reduce", "histc"})
_SUMS_TOO = frozenset({"bincount", "_embedding_bag", "_embedding_bag_backward", "_embedding_bag_dense_backward", "put", "scatter"})
_CALLED = frozenset({"convolution", "convolution_backward"})  # and products: the compiler calls torch's kernels for them
_one_at_a_time = threading.RLock()  # ranks may be threads of one process; the compiler has state of its own


@dataclass(frozen=True, kw_only=True)
class Region:
    """A run of calls. where: the graph; block: of the model; calls: how many; kept: why it runs as it is, "" where it is compiled;
    failure: what the compiler said, where it failed."""

    where: str
    block: str
    calls: int
    kept: str = ""
    failure: str = ""


@dataclass(kw_only=True)
class Compiler:
    """Makes graphs callable, their regions compiled. progress: told what is being compiled.

    regions: all that there are; distinct: how many the compiler was given; seconds: that it took.
    Raises ClusterError where the device's compiler is missing.
    """

    device: torch.device
    progress: Callable[[str], None] = lambda text: None
    regions: list[Region] = field(default_factory=list)
    distinct: int = 0
    seconds: float = 0.0
    _known: dict[Hashable, Function | str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if lacking := missing_compiler(self.device):
            raise ClusterError(
                f"compile=True cannot be done here: {lacking}; or leave compile out: the numbers are the same, at torch's speed"
            )

    @contextmanager
    def watched(self, *, shown: bool) -> Iterator[None]:
        """Inside, what is being compiled is `shown`, and at the end how much was."""
        with CompilingDisplay(shown=shown) as display:
            self.progress = display.update
            yield
            display.done(str(self))

    def function(self, graph: fx.Graph, where: str) -> Function:
        """As `callable_of`. where: which graph this is, for people. The graph must not write over its own values
        (`shardwise.program.reuse.without_reuse`), but for gradient buffers, placeholders whose meta has "buffer"."""
        with _one_at_a_time:
            return _Steps(graph, [self._step(piece, where) for piece in _pieces(graph)])

    def _step(self, piece: _Piece, where: str) -> _Step:
        kept = piece.kept or ("" if _is_worth_it(piece.nodes) else _FEW)
        failure = ""
        if not kept:
            made = self._compiled(piece, where)
            if not isinstance(made, str):
                self.regions.append(Region(where=where, block=piece.block, calls=len(piece.nodes)))
                return _Step(function=made, inputs=piece.inputs, outputs=piece.outputs)
            kept, failure = "the compiler failed", made
            warnings.warn(
                f"{where}, {piece.block or 'outside of blocks'}: {len(piece.nodes)} calls run as torch's own kernels, since the compiler "
                f"failed: {made}",
                ShardwiseWarning,
                stacklevel=2,
            )
        self.regions.append(Region(where=where, block=piece.block, calls=len(piece.nodes), kept=kept, failure=failure))
        return _Step(function=callable_of(piece.graph()), inputs=piece.inputs, outputs=piece.outputs)

    def _compiled(self, piece: _Piece, where: str) -> Function | str:
        """The compiled function, or why there is none."""
        graph, examples = piece.graph(), [node.meta["val"] for node in piece.inputs]
        wanted = [describe(each) for each in examples]
        key = (graph.python_code("self").src, tuple(wanted), torch.get_num_threads())
        if key not in self._known:
            self.distinct += 1
            self.progress(f"{where}, {piece.block or 'outside of blocks'} ({self.distinct})")
            begun = time.perf_counter()
            try:
                self._known[key] = _Fitting(compiled_by_inductor(graph, wanted, self.device), [strides for _, strides, _ in wanted])
            except Exception as error:  # whatever the compiler raises: what it cannot do torch does
                self._known[key] = f"{type(error).__name__}: {_short(error)}"
            self.seconds += time.perf_counter() - begun
        return self._known[key]

    def __str__(self) -> str:
        """`compiled 24 of 61 regions (5 distinct) in 12.1 s; as they are: …`."""
        kept = Counter(region.kept for region in self.regions if region.kept)
        done = len(self.regions) - kept.total()
        head = f"compiled {done} of {len(self.regions)} regions ({self.distinct} distinct) in {self.seconds:.1f} s"
        return "; ".join([head, *([f"as they are: {', '.join(f'{count} {what}' for what, count in kept.most_common())}"] if kept else [])])


class _Fitting:
    """A compiled function, given its inputs with the strides that it was compiled for."""

    def __init__(self, function: Callable[[list[Any]], Sequence[Any]], strides: Sequence[tuple[int, ...]]) -> None:
        self.function, self.strides = function, list(strides)

    def __call__(self, inputs: list[Any]) -> list[Any]:
        for place, strides in enumerate(self.strides):
            if inputs[place].stride() != strides:
                inputs[place] = torch.empty_strided(
                    inputs[place].shape, strides, dtype=inputs[place].dtype, device=inputs[place].device
                ).copy_(inputs[place])
        return list(self.function(inputs))


# -- regions -------------------------------------------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class _Piece:
    """Some calls one after the other. kept: why they are not compiled; inputs: what they read of others; outputs: what others read."""

    block: str
    kept: str
    nodes: list[fx.Node] = field(default_factory=list)
    inputs: list[fx.Node] = field(default_factory=list)
    outputs: list[fx.Node] = field(default_factory=list)

    def graph(self) -> fx.Graph:
        """By itself, equal for equal calls."""
        graph, copies = fx.Graph(), {}
        for number, node in enumerate(self.inputs):
            copies[node] = graph.placeholder(f"input_{number}")
        for node in self.nodes:
            args, kwargs = fx.map_arg((node.args, node.kwargs), copies.__getitem__)
            copies[node] = graph.call_function(node.target, args, kwargs)  # type: ignore[arg-type]
        graph.output([copies[node] for node in self.outputs])
        return graph


def _pieces(graph: fx.Graph) -> list[_Piece]:
    """The graph's calls in their order, but for items, which follow what they are taken of."""
    buffers = {node for node in graph.nodes if node.meta.get("buffer")}
    pieces: list[_Piece] = []
    place: dict[fx.Node, _Piece] = {}
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        if _is_item(node) and node.all_input_nodes[0] in place:
            piece = place[node.all_input_nodes[0]]
        else:
            kept, block = _kept(node, buffers), _block(node)
            piece = pieces[-1] if pieces else _Piece(block="", kept="-")
            if piece.kept != kept or (not kept and piece.block != block):
                piece = _Piece(block=block, kept=kept)
                pieces.append(piece)
        piece.nodes.append(node)
        place[node] = piece
    for piece in pieces:
        own = set(piece.nodes)
        piece.inputs = list(dict.fromkeys(each for node in piece.nodes for each in node.all_input_nodes if each not in own))
        piece.outputs = [node for node in piece.nodes if any(user not in own for user in node.users)]
    return pieces


def _kept(node: fx.Node, buffers: set[fx.Node]) -> str:
    """Why a call is not for the compiler; "" where it is. Views of buffers become buffers."""
    if any(each in buffers for each in node.all_input_nodes):
        if isinstance(node.target, torch._ops.OpOverload) and is_view(node.target):
            buffers.add(node)
        return _BUFFER
    if not isinstance(node.target, torch._ops.OpOverload):
        return "" if _is_item(node) else _OURS
    if node.target.namespace == "shardwise":
        return _OURS
    if node.meta.get("uncounted"):
        return _ROWS
    return _ORDER if name_of(node.target) in _SUMS | _SUMS_TOO else ""


def _block(node: fx.Node) -> str:
    member = list_member(str(node.meta.get("module", "")))
    return "" if member is None else f"{member[0]}.{member[1]}"


def _is_item(node: fx.Node) -> bool:
    return node.op == "call_function" and getattr(node.target, "__name__", "") == "getitem"


def _is_worth_it(nodes: Iterable[fx.Node]) -> bool:
    """Whether there is something to fuse: two kernels at least, one of them the compiler's own."""
    kernels = [name_of(node.target) for node in nodes if not _is_item(node) and not is_view(node.target)]
    return len(kernels) > 1 and any(name not in MATMULS | _CALLED and "attention" not in name for name in kernels)


def _short(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else ""


# -- running -------------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Step:
    function: Function
    inputs: list[fx.Node]
    outputs: list[fx.Node]


class _Steps:
    """The pieces of a graph one after the other; each value is freed where it is used for the last time."""

    def __init__(self, graph: fx.Graph, steps: Sequence[_Step]) -> None:
        names = {node: number for number, node in enumerate(graph.nodes)}
        returned: Any = graph.output_node().args[0]
        self.given = [names[node] for node in graph.nodes if node.op == "placeholder"]
        self.returned = [None if node is None else names[node] for node in returned]
        last: Mapping[int, int] = {names[node]: number for number, step in enumerate(steps) for node in step.inputs}
        kept = set(self.returned)
        self.steps = [
            (
                step.function,
                [(names[node], last[names[node]] == number and names[node] not in kept) for node in step.inputs],
                [names[node] for node in step.outputs],
            )
            for number, step in enumerate(steps)
        ]

    def __call__(self, inputs: list[Any]) -> list[Any]:
        values: dict[int, Tensor] = dict(zip(self.given, inputs, strict=True))
        inputs.clear()
        for function, read, made in self.steps:
            values.update(zip(made, function([values.pop(name) if frees else values[name] for name, frees in read]), strict=True))
        return [None if name is None else values[name] for name in self.returned]
