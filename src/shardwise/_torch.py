"""The private or changing parts of torch that shardwise stands on, in one place."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import fx
from torch._library.custom_ops import OPDEFS
from torch._subclasses.fake_impls import fast_detach
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import get_proxy_mode, make_fx
from torch.fx.graph import CodeGen
from torch.utils._python_dispatch import _disable_current_modes as without_modes
from torch.utils._python_dispatch import autograd_would_have_decomposed
from torch.utils.data._utils import worker as data_worker

__all__ = [
    "BoxedCodeGen",
    "FaithfulFakeMode",
    "FakeTensor",
    "FakeTensorMode",
    "compiled_by_inductor",
    "find_group",
    "forget_conversions",
    "functions_behind",
    "is_written_out",
    "make_fx",
    "missing_compiler",
    "register_group",
    "traced_names",
    "with_autograd",
    "without_gradient",
    "without_modes",
    "worker_of_stream",
]


class FaithfulFakeMode(FakeTensorMode):
    """Describes tensors as torch's kernels make them, where torch's own descriptions say other strides."""

    _CONTIGUOUS = (torch.ops.aten.native_layer_norm_backward.default,)
    _LIKE_FIRST = (torch.ops.aten.softplus_backward.default,)

    def dispatch(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result: Any = super().dispatch(func, types, args, kwargs or {})
        if func in self._CONTIGUOUS:
            return tuple(None if each is None else self._contiguous(each) for each in result)
        if func in self._LIKE_FIRST and torch._prims_common.is_non_overlapping_and_dense_or_false(args[0]):
            like = torch.empty_strided(args[0].shape, args[0].stride(), dtype=result.dtype, device="meta")
            return FakeTensor(self, like, result.fake_device)
        return result

    def _contiguous(self, tensor: Any) -> Any:
        if tensor.is_contiguous():
            return tensor
        return FakeTensor(self, torch.empty(tensor.shape, dtype=tensor.dtype, device="meta"), tensor.fake_device)


@contextmanager
def with_autograd() -> Iterator[None]:
    """Autograd is on, also inside an operator's implementation, below which torch switches it off."""
    included, excluded = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()
    for key in (torch._C.DispatchKey.AutogradFunctionality, torch._C.DispatchKey.AutogradOther, torch._C.DispatchKey.ADInplaceOrView):
        excluded = excluded.remove(key)  # not all above the implementation: autocast is there, too
    with torch._C._ForceDispatchKeyGuard(included, excluded), torch.enable_grad():
        yield


def forget_conversions(mode: FakeTensorMode) -> None:
    """Lets go of the weak references to described tensors, with which `Module.to` could not replace a parameter."""
    mode.fake_tensor_converter.meta_converter.tensor_memo.clear()


def without_gradient(tensor: torch.Tensor) -> torch.Tensor:
    """Another description of a tensor, which holds none of autograd's graph; no operator is called for it."""
    return fast_detach(tensor.fake_mode, tensor) if isinstance(tensor, FakeTensor) else tensor.detach()


def is_written_out(func: torch._ops.OpOverload, first: torch.Tensor | None) -> bool:
    """Whether autograd would have called simpler operators instead of this one. first: the first tensor that it is given."""
    return _is_written_out(func, None if first is None else first.device.type)


@functools.lru_cache(maxsize=4096)
def _is_written_out(func: torch._ops.OpOverload, device: str | None) -> bool:
    with without_modes():
        return autograd_would_have_decomposed(func, [] if device is None else [torch.empty(0, device=device)])


def traced_names() -> set[str]:
    """Names of the nodes that the make_fx trace in progress has recorded so far."""
    mode = get_proxy_mode()
    assert mode is not None, "no trace is in progress"
    return {node.name for node in mode.tracer.graph.nodes}


def register_group(name: str, group: torch.distributed.ProcessGroup) -> None:
    """Lets torch's operators find a process group by this name; it takes the place of an earlier job's of the same ranks."""
    with suppress(RuntimeError):
        torch._C._distributed_c10d._unregister_process_group(name)  # type: ignore[arg-type]
    torch._C._distributed_c10d._register_process_group(name, group)  # type: ignore[arg-type]


def find_group(name: str) -> torch.distributed.ProcessGroup:
    """The process group registered under this name."""
    return torch.distributed.distributed_c10d._resolve_process_group(name)  # type: ignore[arg-type]


def functions_behind(target: torch._ops.OpOverload) -> list[Callable[..., Any]]:
    """The Python functions of an operator made with torch.library.custom_op, forward and backward; none for others."""
    made = OPDEFS.get(target._schema.name)
    found = [getattr(made, name, None) for name in ("_init_fn", "_setup_context_fn", "_backward_fn")]
    return [function for function in found if callable(function)]


class BoxedCodeGen(CodeGen):
    """Python code that takes its inputs in one list and empties it, so that each is freed at its last use."""

    def gen_fn_def(self, free_vars: list[str], maybe_return_annotation: str, **more: Any) -> str:
        names = [name.split(":")[0].strip() for name in free_vars]
        unpack = f"    {', '.join(names)}, = inputs\n    inputs.clear()\n" if names else ""
        return f"def forward(self, inputs: list){maybe_return_annotation}:\n{unpack}"

    def process_inputs(self, *args: Any) -> Any:
        return args[0]


def missing_compiler(device: torch.device) -> str:
    """What torch's inductor lacks to compile for a device, and how to get it; "" where it lacks nothing."""
    if device.type == "cuda":
        from torch.utils._triton import has_triton

        return "" if has_triton() else "inductor needs Triton for this GPU: pip install triton"
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except (InvalidCxxCompiler, RuntimeError):
        return "inductor needs a C++ compiler: install one (apt install g++), or name yours in the environment's CXX"
    return ""


def compiled_by_inductor(
    graph: fx.Graph, inputs: Sequence[tuple[Sequence[int], Sequence[int], torch.dtype]], device: torch.device
) -> Callable[[list[Any]], Sequence[Any]]:
    """A graph of ATen operators, without side effects, that returns a list, compiled for inputs of these shapes, strides and dtypes.

    The function takes its inputs in one list, which it empties; results have the strides that the operators give them.
    """
    from torch._inductor import config
    from torch._inductor.compile_fx import compile_fx_inner
    from torch._inductor.decomposition import select_decomp_table

    mode = FaithfulFakeMode(allow_non_fake_inputs=True)
    with mode, torch.no_grad():
        examples = [torch.empty_strided(shape, strides, dtype=dtype, device=device) for shape, strides, dtype in inputs]
        traced = make_fx(fx.GraphModule(torch.nn.Module(), graph), decomposition_table=select_decomp_table())(*examples)
    traced.graph.eliminate_dead_code()
    traced.recompile()
    output = traced.graph.output_node()
    output.meta["user_visible_output_idxs"] = [place for place, node in enumerate(output.args[0]) if isinstance(node, fx.Node)]  # type: ignore[arg-type]
    with config.patch(compile_threads=1), torch.no_grad():
        return compile_fx_inner(traced, examples)


Function = Callable[[Sequence[Any]], Any]


def worker_of_stream() -> tuple[int, Callable[[], bool]]:
    """(number of this data worker, whether what it reads is a part: it is the only one, or has been asked since which one it is)."""
    info = data_worker.get_worker_info()
    if info is None or info.num_workers == 1:
        return (info.id if info else 0), lambda: True
    asked: set[str] = set()

    class Asked:
        def __getattr__(self, name: str) -> Any:
            asked.add(name)
            return getattr(info, name)

    data_worker._worker_info = Asked()  # type: ignore[assignment]
    return info.id, lambda: "id" in asked
