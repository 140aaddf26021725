"""A call of each operator, to show its rule on: the operator as it would be captured, from shapes and constants.

Shapes are written `4,5,6 9,6 9`, dims by commas and tensors by blanks, `:int` or `:bool` after those that hold no floats; constants as in a
call: `-1, approximate='tanh'`. Where none are given, those of `EXAMPLES` are taken, or the first that the operator accepts.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from shardwise.capture.graph import Op, operator_name
from shardwise.errors import RuleError
from shardwise.sharding.trial import sample

__all__ = ["EXAMPLES", "Example", "example", "example_call"]


@dataclass(frozen=True, kw_only=True)
class Example:
    """shapes, args: as the user would write them."""

    shapes: str
    args: str = ""


def _all(names: str, shapes: str, args: str = "") -> dict[str, Example]:
    return {f"aten.{name}": Example(shapes=shapes, args=args) for name in names.split()}


EXAMPLES: Mapping[str, Example] = {
    **_all("linear.default", "4,5,6 9,6 9"),
    **_all("addmm.default", "5 4,6 6,5"),
    **_all("mm.default", "4,6 6,5"),
    **_all("bmm.default", "3,4,6 3,6,5"),
    **_all("baddbmm.default", "3,4,5 3,4,6 3,6,5"),
    **_all("matmul.default", "4,5,6 6,7"),
    **_all("einsum.default", "4,5,6 9,6", "'bsk,nk->bsn'"),
    **_all("scaled_dot_product_attention.default", "4,6,5,8 4,6,7,8 4,6,7,8"),
    **_all("conv1d.default", "4,6,9 8,6,3 8"),
    **_all("conv2d.default conv2d.padding", "4,6,9,7 8,6,3,3 8"),
    **_all("conv3d.default conv3d.padding", "2,6,5,4,4 8,6,2,2,2 8"),
    **_all("embedding.default", "20,8 4,5:int"),
    **_all("layer_norm.default", "4,5,8 8 8", "[8]"),
    **_all("rms_norm.default", "4,5,8 8", "[8]"),
    **_all("group_norm.default", "4,6,5 6 6", "3"),
    **_all("reshape.default view.default _unsafe_view.default", "4,6", "[2, 2, 6]"),
    **_all("permute.default", "4,5,6", "[2, 0, 1]"),
    **_all("transpose.int", "4,5,6", "1, 2"),
    **_all("expand.default broadcast_to.default", "4,1,6", "[4, 5, 6]"),
    **_all("cat.default concat.default stack.default", "4,6 4,6", ", 1"),
    **_all("split.Tensor", "4,9", "3, 1"),
    **_all("chunk.default", "4,6", "2, 1"),
    **_all("split_with_sizes.default", "4,9", "[4, 5], 1"),
    **_all("slice.Tensor", "4,9", "1, 2, 6"),
    **_all("select.int", "4,9", "1, 2"),
    **_all("index.Tensor", "9,6 4:int"),
    **_all("gather.default", "4,6 4,3:int", "1"),
    **_all("index_select.default", "9,6 4:int", "0"),
    **_all("arange.default", "", "8"),
    **_all("arange.start", "", "2, 8"),
    **_all("softmax.int log_softmax.int", "4,5,6", "-1"),
    **_all("to.dtype", "4,6", "torch.float64"),
    **_all("where.self", "4,6:bool 4,6 4,6"),
    **_all("masked_fill.Scalar", "4,6 4,6:bool", "0.0"),
    **_all("cross_entropy_loss.default", "4,7 4:int"),
    **_all("topk.default", "4,9", "3"),
    **_all("clamp.default clip.default", "4,6", "-1.0, 1.0"),
    **_all("pad.default constant_pad_nd.default", "4,6", "[1, 2]"),
    **_all("mv.default", "4,6 6"),
    **_all("addbmm.default", "4,5 3,4,6 3,6,5"),
    **_all("conv_transpose2d.input", "4,6,5,3 6,8,2,2 8"),
    **_all("native_layer_norm.default", "4,5,8 8 8", "[8], 1e-5"),
    **_all("bincount.default", "9:int", "minlength=12"),
    **_all("unflatten.int", "4,6", "1, [2, 3]"),
    "shardwise.cross_entropy_sum": Example(shapes="4,7 4:int", args="None, -100, 0.0"),
    "shardwise.valid_count": Example(shapes="4:int", args="None, -100, torch.float32"),
    "shardwise.batch_norm": Example(shapes="4,6,5 6 6 6 6", args="0.1, 1e-5"),
    "shardwise.keyed_dropout": Example(shapes="4,6 2:int", args="0.1, key=0"),
    "shardwise.dropped_attention": Example(shapes="4,6,5,8 4,6,5,8 4,6,5,8 5,5 2:int", args="0.1, False, 0.3, key=0"),
}

_GUESSES = ("4,6", "4,6,8", "4,6,8,10", "4,6,8,10,12", "4,6:int", "12", "6,6", "4,6,6", "4,6:bool", "4,6,2", "4,6:complex")
_FILLED: Mapping[str, Any] = {"int": 1, "SymInt": 1, "float": 0.5, "number": 2, "bool": False, "str": "mean"}
_DTYPES = {"": torch.float32, "int": torch.int64, "bool": torch.bool, "float": torch.float32, "complex": torch.complex64}


def example(target: Any) -> Iterator[Example]:
    """What may be tried to show an operator's rule: its own example, else guesses."""
    if (own := EXAMPLES.get(operator_name(target))) is not None:
        yield own
        return
    needed = sum(kind in ("tensor", "tensors") and not has_default for kind, _, has_default, _ in _parameters(target))
    for count in dict.fromkeys((needed, needed + 1)):
        for shape in _GUESSES if count else ("",):
            yield Example(shapes=" ".join([shape] * count))


def example_call(target: Any, given: Example) -> Op:
    """The operator's call, run on random tensors. Raises RuleError when it cannot be read or run."""
    name = operator_name(target)
    try:
        tensors = [_tensor(text) for text in given.shapes.split()]
    except (ValueError, KeyError) as error:
        raise RuleError(f'shapes {given.shapes!r} are not understood ({error}); write them as "4,5,6 9,6 9" or "20,8 4,5:int"') from error
    args, kwargs = _constants(given.args)
    filled = _filled(target, tensors, args, kwargs)
    try:
        return sample(target, *filled, **kwargs).op
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise RuleError(
            f"{name} does not take the shapes {given.shapes!r} and constants {given.args!r}: {reason}; its form: {_form(target)}"
        ) from error


def _tensor(text: str) -> Tensor:
    """`4,5:int`; `-` is a scalar."""
    sizes, _, kind = text.partition(":")
    shape = [] if sizes == "-" else [int(size) for size in sizes.split(",")]
    dtype = _DTYPES[kind]
    if dtype is torch.bool:
        return torch.rand(shape) > 0.5
    return torch.zeros(shape, dtype=dtype) if dtype is torch.int64 else torch.rand(shape, dtype=dtype)


def _constants(text: str) -> tuple[list[Any], dict[str, Any]]:
    """The positional and the named ones; a leading comma passes over what the tensors fill."""
    try:
        found = ast.parse(f"f({text.lstrip(', ')})", mode="eval").body
        assert isinstance(found, ast.Call)
        return [_literal(node) for node in found.args], {str(each.arg): _literal(each.value) for each in found.keywords}
    except (SyntaxError, ValueError) as error:
        raise RuleError(f"constants {text!r} are not understood ({error}); write them as in a call: \"-1, approximate='tanh'\"") from error


def _literal(node: ast.expr) -> Any:
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "torch":
        found = getattr(torch, node.attr, None)
        if isinstance(found, torch.dtype):
            return found
    return ast.literal_eval(node)


Parameter = tuple[str, Any, bool, str]  # "tensor", "tensors" or a constant's type; default; whether there is one; name


def _parameters(target: Any) -> list[Parameter]:
    """The positional parameters of an operator."""
    if isinstance(target, torch._ops.OpOverload):
        return [_of_schema(each) for each in target._schema.arguments if not each.kwarg_only]
    return [
        (
            "tensor" if str(each.annotation).startswith("Tensor") else str(each.annotation),
            None if each.default is each.empty else each.default,
            each.default is not each.empty,
            name,
        )
        for name, each in inspect.signature(target).parameters.items()
        if each.kind is not each.KEYWORD_ONLY
    ]


def _of_schema(argument: Any) -> Parameter:
    text = str(argument.type)
    has_default = argument.has_default_value() or text.startswith("Optional")
    return _kind(text, getattr(argument, "N", None)), argument.default_value, has_default, argument.name


def _kind(text: str, length: int | None) -> str:
    """`length`: of a list of numbers, where the operator fixes it."""
    bare = text.removeprefix("Optional[").removesuffix("]") if text.startswith("Optional[") else text
    if bare.startswith("List["):
        return "tensors" if "Tensor" in bare else f"ints[{length or 1}]"
    return "tensor" if bare == "Tensor" else bare


def _filled(target: Any, tensors: Sequence[Tensor], args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
    """The tensors where the operator takes some, the constants elsewhere, and something where neither is given and needed."""
    left, constants = list(tensors), list(args)
    found: list[Any] = []
    for kind, default, has_default, name in _parameters(target):
        if name in kwargs:
            break
        if kind == "tensors":
            found.append(left)
            left = []
        elif kind == "tensor" and left:
            found.append(left.pop(0))
        elif constants:
            found.append(constants.pop(0) if kind != "tensor" or constants[0] is None else default)
        elif has_default:
            found.append(default)
        else:
            found.append([1] * int(kind[5:-1]) if kind.startswith("ints[") else _FILLED.get(kind))
    if left or constants:
        raise RuleError(f"{operator_name(target)} takes no {len(tensors)} tensors and {len(args)} constants; its form: {_form(target)}")
    return found


def _form(target: Any) -> str:
    return str(target._schema) if isinstance(target, torch._ops.OpOverload) else f"{target.__name__}{inspect.signature(target)}"
