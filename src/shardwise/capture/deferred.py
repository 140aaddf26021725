"""Builds a model without its weights, and makes their values afterwards, each when it is wanted.

    defer(build)     runs `build` on descriptions of tensors; what torch would have done is written down        Deferred
    Deferred.values  does it, with the numbers that one device would have drawn, and keeps what `wanted` takes of each tensor

Values are those of an ordinary construction bit by bit: every random operator is done whole, in the order of the construction and from
the state that its generator would have had then. All else is done as late as somebody needs it and as early as a wanted tensor becomes
complete, so that it can be cut and freed at once:

    weight  uniform_(w)  ······················  normal_(w)  ─▶ this rank's part        uniform_: drawn into scratch memory, for nothing
    bias    ··············································· zeros(b)  ─▶ part            reads it before normal_ overwrites it

So there is never more than what is kept and the tensors that an operator works on. It takes the time of the whole construction.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from shardwise._torch import FakeTensor, FakeTensorMode, forget_conversions, without_modes
from shardwise.errors import CaptureError

__all__ = ["Deferred", "defer"]

Take = Callable[[Tensor], Tensor]

_FILLS = {
    "bernoulli_", "cauchy_", "copy_", "exponential_", "fill_", "geometric_", "log_normal_", "normal_", "random_", "uniform_", "zero_",
}  # fmt: skip
"""In-place operators whose result does not depend on what was there before."""

_LARGE_BYTES = 1 << 20
_MARK = 0x5AFE_0000_0000_0000  # seeds that mark a generator as being where it is after a recorded operator


@dataclass(frozen=True)
class _Place:
    """A tensor as a region of a storage."""

    storage: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype


@dataclass(frozen=True)
class _Constant:
    """A tensor that existed before, or was made from numbers."""

    tensor: Tensor


@dataclass(eq=False, kw_only=True)
class _Step:
    """One operator. By storage: reads, what it changes or makes (writes), of these what it overwrites whole or makes anew (fresh).

    generator: which it draws from, None for none; state: the generator's before it; after: or the step after which it is in that state.
    """

    number: int
    target: Any
    args: Any
    outputs: list[_Place | None]
    reads: frozenset[int]
    writes: frozenset[int]
    fresh: frozenset[int]
    made: frozenset[int]
    generator: torch.Generator | None = None
    state: Tensor | None = None
    after: _Step | None = None

    @property
    def touches(self) -> frozenset[int]:
        return self.reads | self.writes


@dataclass(kw_only=True)
class _Record:
    """What a construction did. first: the state in which each generator was met."""

    steps: list[_Step] = field(default_factory=list)
    bytes_of: dict[int, int] = field(default_factory=dict)
    alive: list[Any] = field(default_factory=list)  # storages are known by address, which must not be used again
    numbers: dict[int, int] = field(default_factory=dict)
    first: dict[torch.Generator, Tensor] = field(default_factory=dict)
    known: dict[tuple[int, bytes], _Step] = field(default_factory=dict)

    def place(self, tensor: Tensor) -> _Place:
        storage = tensor.untyped_storage()
        if storage._cdata not in self.numbers:
            self.numbers[storage._cdata] = len(self.numbers)
            self.alive.append(storage)
        number = self.numbers[storage._cdata]
        self.bytes_of[number] = max(self.bytes_of.get(number, 0), storage.nbytes())
        return _Place(number, tuple(tensor.shape), tuple(tensor.stride()), int(tensor.storage_offset()), tensor.dtype)

    def covers(self, place: _Place) -> bool:
        """Whether a tensor is all of its storage, each element once."""
        dense = sorted((stride, size) for stride, size in zip(place.stride, place.shape, strict=True) if size > 1)
        expected = 1
        for stride, size in dense:
            if stride != expected:
                return False
            expected *= size
        return math.prod(place.shape) * place.dtype.itemsize == self.bytes_of[place.storage]


class _Recorder(TorchDispatchMode):
    """Describes tensors by the mode below and writes down what is done to them."""

    def __init__(self, record: _Record, mode: FakeTensorMode) -> None:
        super().__init__()
        self.record, self.mode = record, mode

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            return self._value(args[0])
        if func.namespace == "prim":  # asks for the device and the like
            return func(*args, **kwargs)
        with self:
            parts = func.decompose(*args, **kwargs)  # an operator that is made of others
        if parts is not NotImplemented:
            return parts
        result = func(*args, **kwargs)
        forget_conversions(self.mode)
        self._write_down(func, args, kwargs, result)
        return result

    def _value(self, tensor: Tensor) -> bool | int | float | complex:
        """The code asks for the value of a tensor."""
        place = self.record.place(tensor)
        with without_modes():
            return _Replay(self.record).run({"": (place, torch.clone)})[""].item()

    def _write_down(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        before = [each for each in pytree.tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
        inputs = {self.record.place(each).storage for each in before if isinstance(each, FakeTensor)}
        changed = [each for each in _changed(func, args, kwargs) if isinstance(each, Tensor)]
        if strange := [each for each in changed if not isinstance(each, FakeTensor)]:
            raise CaptureError(
                f"{func} changes a tensor of shape {list(strange[0].shape)} that was made before the model was built; change a copy of it"
            )
        results = [each if isinstance(each, FakeTensor) else None for each in pytree.tree_leaves(result)]
        outputs = [None if each is None else self.record.place(each) for each in results]
        made = frozenset(each.storage for each in outputs if each is not None) - inputs
        if not made and (not changed or torch.Tag.inplace_view in func.tags):
            return  # a view: tensors are found again by their place in a storage
        targets = [self.record.place(each) for each in changed]
        template = pytree.tree_map(self._template, (args, _factory(func, args, kwargs, results)))
        reads, fresh = frozenset(inputs), made
        if func._schema.name.removeprefix("aten::") in _FILLS and self.record.covers(targets[0]):
            others = {self.record.place(each).storage for each in before if isinstance(each, FakeTensor) and each is not args[0]}
            if targets[0].storage not in others:
                fresh, reads = made | {targets[0].storage}, frozenset(others)
        step = _Step(
            number=len(self.record.steps),
            target=func,
            args=template,
            outputs=outputs,
            reads=reads,
            writes=made | {each.storage for each in targets},
            fresh=fresh,
            made=made,
        )
        if torch.Tag.nondeterministic_seeded in func.tags:
            self._follow(step, next((each for each in kwargs.values() if isinstance(each, torch.Generator)), torch.default_generator))
        self.record.steps.append(step)

    def _template(self, value: Any) -> Any:
        if isinstance(value, FakeTensor):
            return self.record.place(value)
        if isinstance(value, Tensor):
            with without_modes():
                return _Constant(value.detach().clone())
        return value

    def _follow(self, step: _Step, generator: torch.Generator) -> None:
        """Notes where the generator is, and marks it as being after this step."""
        with without_modes():
            state = generator.get_state()
            step.generator, step.after = generator, self.record.known.get(_key(generator, state))
            if step.after is None:
                step.state = state
            self.record.first.setdefault(generator, state)
            generator.manual_seed(_MARK + step.number)
            self.record.known[_key(generator, generator.get_state())] = step


def _key(generator: torch.Generator, state: Tensor) -> tuple[int, bytes]:
    return id(generator), state.numpy().tobytes()


def _changed(func: Any, args: Any, kwargs: Any) -> Iterator[Any]:
    """The arguments that an operator changes in place."""
    for index, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[index] if index < len(args) else kwargs.get(argument.name)
            yield from value if isinstance(value, (list, tuple)) else [value]


def _factory(func: Any, args: Any, kwargs: Any, results: Sequence[Tensor | None]) -> dict[str, Any]:
    """Keyword arguments with what an operator that makes a tensor took from its surroundings: the default dtype and device."""
    names = {argument.name for argument in func._schema.arguments}
    if not {"dtype", "device"} <= names or not results or results[0] is None:
        return dict(kwargs)
    return {**kwargs, "dtype": results[0].dtype, "device": torch.device("cpu"), **({"pin_memory": False} if "pin_memory" in kwargs else {})}


class _Replay:
    """Does recorded steps."""

    def __init__(self, record: _Record) -> None:
        self.record = record

    @torch.no_grad()
    def run(self, wanted: Mapping[str, tuple[_Place, Take]], *, to_the_end: bool = False) -> dict[str, Tensor]:
        """What each `Take` makes of its tensor. to_the_end: generators are left as the whole construction would leave them."""
        steps, self.scratch = self._needed({place.storage for place, _ in wanted.values()})
        self.last = {storage: step for step in steps for storage in step.touches - self.scratch.get(step, frozenset())}
        self.wanted: dict[int, dict[str, tuple[_Place, Take]]] = {}
        for name, (place, take) in wanted.items():
            self.wanted.setdefault(place.storage, {})[name] = place, take
        self.live: dict[int, torch.UntypedStorage] = {}
        self.found: dict[str, Tensor] = {}
        for storage in set(self.wanted) - set(self.last):  # never written
            self._finish(storage)
        with _generators(self.record, steps, to_the_end=to_the_end) as draw:
            for step in steps:
                self._do(step, draw)
        return {name: self.found[name] for name in wanted}

    def _needed(self, wanted: set[int]) -> tuple[list[_Step], dict[_Step, frozenset[int]]]:
        """The steps to do, in their new order, and what of their results goes into scratch memory: values that nobody reads."""
        steps, scratch = self._live(wanted, random=False)
        self.draws = any(step.generator is not None for step in steps)
        if self.draws:
            steps, scratch = self._live(wanted, random=True)
        return _ordered(steps, scratch), scratch

    def _live(self, wanted: set[int], *, random: bool) -> tuple[list[_Step], dict[_Step, frozenset[int]]]:
        """random: all random steps are done, since each moves its generator."""
        live, steps, scratch = set(wanted), [], {}
        for step in reversed(self.record.steps):
            if not (step.writes & live or (random and step.generator)):
                continue
            steps.append(step)
            scratch[step] = (step.fresh - step.made) - live
            live = (live - step.fresh) | step.reads
        return steps[::-1], scratch

    def _do(self, step: _Step, draw: Callable[[_Step], None]) -> None:
        apart: dict[int, torch.UntypedStorage] = {}
        scratch = self.scratch[step]

        def filled(value: Any) -> Any:
            if isinstance(value, _Constant):
                return value.tensor.clone()  # a view of it may be changed
            if not isinstance(value, _Place):
                return value
            return self._tensor(value, apart if value.storage in scratch else self.live)

        args, kwargs = pytree.tree_map(filled, step.args, is_leaf=lambda value: isinstance(value, (_Place, _Constant)))
        draw(step)
        results = pytree.tree_leaves(step.target(*args, **kwargs))
        for place, result in zip(step.outputs, results, strict=True):
            if place is not None and place.storage in step.made:
                self.live[place.storage] = _as_described(result, place).untyped_storage()
        for storage in (step.touches | step.made) - scratch:
            if self.last.get(storage) is step:
                self._finish(storage)

    def _tensor(self, place: _Place, where: dict[int, torch.UntypedStorage]) -> Tensor:
        needed = self.record.bytes_of[place.storage]
        if place.storage not in where:
            where[place.storage] = _fresh(needed)
        storage = where[place.storage]
        assert storage.nbytes() >= needed, "a tensor in place grew"
        return torch.empty(0, dtype=place.dtype).set_(storage, place.offset, place.shape, place.stride)

    def _finish(self, storage: int) -> None:
        """Nobody changes or reads it any more: what is wanted of it is taken, and the rest freed."""
        for name, (place, take) in self.wanted.get(storage, {}).items():
            self.found[name] = take(self._tensor(place, self.live))
        self.live.pop(storage, None)


def _fresh(nbytes: int) -> torch.UntypedStorage:
    """Memory; much of it directly from the system, to which it goes back at once: malloc keeps holes that the next tensor just misses."""
    if nbytes < _LARGE_BYTES:
        return torch.UntypedStorage(nbytes)
    return torch.frombuffer(mmap.mmap(-1, nbytes), dtype=torch.uint8).untyped_storage()


def _as_described(result: Tensor, place: _Place) -> Tensor:
    """A result as its description said that it would lie in memory."""
    if (tuple(result.stride()), result.storage_offset()) == (place.stride, place.offset):
        return result
    laid = torch.empty_strided(place.shape, place.stride, dtype=place.dtype)
    return laid.copy_(result)


def _ordered(steps: list[_Step], scratch: Mapping[_Step, frozenset[int]]) -> list[_Step]:
    """Random steps in their own order; others with followers just before the first of these, the last ones as soon as they can be done.

    A slot is (number of a random step, whether before or after it); what is in one slot keeps its order.
    """
    before, after = _neighbours(steps, scratch)
    ready: dict[_Step, tuple[int, int]] = {}
    for step in steps:
        ready[step] = (step.number, 0) if step.generator else max((_behind(each, ready) for each in before[step]), default=(-1, 1))
    slot: dict[_Step, tuple[int, int]] = {}
    for step in reversed(steps):
        due = [(each.number, -1) if each.generator else slot[each] for each in after[step]]
        slot[step] = ready[step] if step.generator else min(due, default=ready[step])
    return sorted(steps, key=lambda step: (*slot[step], step.number))


def _behind(step: _Step, ready: Mapping[_Step, tuple[int, int]]) -> tuple[int, int]:
    return (step.number, 1) if step.generator else ready[step]


def _neighbours(steps: list[_Step], scratch: Mapping[_Step, frozenset[int]]) -> tuple[dict[_Step, list[_Step]], dict[_Step, list[_Step]]]:
    """What each step must follow, and what must follow it: a storage's readers come after its writer and before the next."""
    before: dict[_Step, list[_Step]] = {step: [] for step in steps}
    after: dict[_Step, list[_Step]] = {step: [] for step in steps}
    writer: dict[int, _Step] = {}
    readers: dict[int, list[_Step]] = {}
    for step in steps:
        own = step.writes - scratch[step]
        found = [writer[each] for each in step.reads | own if each in writer] + [each for one in own for each in readers.get(one, [])]
        for each in dict.fromkeys(found):
            before[step].append(each)
            after[each].append(step)
        for storage in step.reads:
            readers.setdefault(storage, []).append(step)
        for storage in own:
            writer[storage], readers[storage] = step, []
    return before, after


class _generators:  # noqa: N801 - used as a function
    """Puts the generators into the state that a step must find, and back at the end."""

    def __init__(self, record: _Record, steps: Iterable[_Step], *, to_the_end: bool) -> None:
        self.record, self.to_the_end = record, to_the_end
        self.drawing = [step for step in steps if step.generator]
        self.latest: dict[torch.Generator, _Step] = {}
        self.kept: dict[_Step, Tensor] = {}

    def __enter__(self) -> Callable[[_Step], None]:
        self.outside = {generator: generator.get_state() for generator in self.record.first}
        self.ends = {generator: self.record.known.get(_key(generator, state)) for generator, state in self.outside.items()}
        again = {step.after for step in self.drawing if step.after} | set(self.ends.values())
        self.returned_to = {step for step in again if step is not None}
        return self.draw

    def draw(self, step: _Step) -> None:
        generator = step.generator
        if generator is None:
            return
        latest = self.latest.get(generator)
        if latest in self.returned_to:
            self.kept[latest] = generator.get_state()
        if step.state is not None:
            generator.set_state(step.state)
        elif step.after is not latest:
            assert step.after is not None
            generator.set_state(self.kept[step.after])
        self.latest[generator] = step

    def __exit__(self, *error: object) -> None:
        for generator, state in self.outside.items():
            end, latest = self.ends[generator], self.latest.get(generator)
            if self.to_the_end and self.drawing and end is not None:
                generator.set_state(generator.get_state() if end is latest else self.kept[end])
            else:
                generator.set_state(state)


# -- the model -----------------------------------------------------------------------------------------------------------------------------


class Deferred:
    """A model on the meta device, and how its weights are made. model: what was built, or the first module in what was returned."""

    def __init__(self, built: Any, record: _Record, end: dict[torch.Generator, Tensor], usual: set[str]) -> None:
        self._record, self._end, self._built = record, end, built
        found = [each for each in pytree.tree_leaves(built) if isinstance(each, nn.Module)]
        if not found:
            raise CaptureError(f"a function that builds a model returned {type(built).__name__}, with no nn.Module in it")
        self.model = found[0]
        tensors = _tensors(self.model)
        self._places = {name: record.place(each) for name, each in tensors.items() if isinstance(each, FakeTensor)}
        self._given = {name: each.detach() for name, each in tensors.items() if name not in self._places}  # made before, or by NumPy
        self._meta = _Meta(usual)
        self._meta.swap(self.model)
        _fill_in(self.model, lambda tensor: self._meta.known[id(tensor)] if id(tensor) in self._meta.known else self._real(tensor))

    @property
    def described(self) -> Any:
        """All that was returned; tensors that are not of the model are on the meta device, too."""
        return pytree.tree_map(lambda each: self._meta.of(each) if isinstance(each, FakeTensor) else each, self._built)

    def values(self, wanted: Mapping[str, Take]) -> dict[str, Tensor]:
        """What each function makes of the parameter or buffer of that name, which it gets whole, on the CPU.

        Generators that the construction draws from end in the state in which it would leave them, if anything wanted is drawn.
        """
        made = self._replayed({name: (self._places[name], take) for name, take in wanted.items() if name in self._places}, to_the_end=True)
        return {name: made[name] if name in made else take(self._given[name]) for name, take in wanted.items()}

    def _real(self, tensor: Tensor) -> Tensor:
        return self._replayed({"": (self._record.place(tensor), torch.clone)})[""]

    def _replayed(self, wanted: Mapping[str, tuple[_Place, Take]], *, to_the_end: bool = False) -> dict[str, Tensor]:
        before = {generator: generator.get_state() for generator in self._end}
        for generator, state in self._end.items():
            generator.set_state(state)
        replay, found = _Replay(self._record), None
        try:
            found = replay.run(wanted, to_the_end=to_the_end)
        finally:
            moved = found is not None and to_the_end and replay.draws
            for generator, state in before.items() if not moved else ():
                generator.set_state(state)
        return found


def defer(build: Callable[[], Any]) -> Deferred:
    """Runs a function that builds a model, or a structure with a model in it, without taking memory for what it makes.

    Generators that it draws from are left as they were. Values that its code asks for (`.item()`, `.tolist()`) are computed.
    Raises CaptureError where the construction asks for more than descriptions of tensors can tell (`.numpy()`).
    """
    record = _Record(first={torch.default_generator: torch.get_rng_state()})
    try:
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            usual = set(vars(torch.empty(1)))
            with _Recorder(record, mode):
                built = build()
        end = {generator: generator.get_state() for generator in record.first}
    except CaptureError:
        raise
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else "(no message)"
        raise CaptureError(
            f"the model cannot be built without its weights: {type(error).__name__}: {reason}. Build it on cpu and pass the model itself"
        ) from error
    finally:
        for generator, state in record.first.items():
            generator.set_state(state)
    return Deferred(built, record, end, usual)


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers(remove_duplicate=False))}


@dataclass
class _Meta:
    """Tensors of the meta device in the place of described ones, tied ones tied. usual: attributes that every described tensor has."""

    usual: set[str]
    known: dict[int, Tensor] = field(default_factory=dict)

    def of(self, tensor: Tensor) -> Tensor:
        if id(tensor) not in self.known:
            empty = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
            if isinstance(tensor, nn.Parameter):
                empty = nn.Parameter(empty, tensor.requires_grad)
                own = {name: value for name, value in vars(tensor).items() if name not in self.usual}
                vars(empty).update({name: value for name, value in own.items() if not isinstance(value, FakeTensor)})
            self.known[id(tensor)] = empty
        return self.known[id(tensor)]

    def swap(self, model: nn.Module) -> None:
        """Parameters and buffers."""
        for module in model.modules():
            for held in (module._parameters, module._buffers):
                for name, tensor in held.items():
                    if tensor is not None:
                        held[name] = self.of(tensor)  # type: ignore[assignment]


def _fill_in(model: nn.Module, real: Callable[[Tensor], Tensor]) -> None:
    """Gives other tensors that modules keep as attributes their values."""
    for module in model.modules():
        for name, value in list(vars(module).items()):
            if name not in ("_parameters", "_buffers", "_modules") and _holds(value):
                filled = pytree.tree_map(lambda each: real(each) if isinstance(each, FakeTensor) else each, value)
                object.__setattr__(module, name, filled)


def _holds(value: Any) -> bool:
    plain = isinstance(value, (FakeTensor, list, tuple, dict))
    return plain and any(isinstance(each, FakeTensor) for each in pytree.tree_leaves(value))
