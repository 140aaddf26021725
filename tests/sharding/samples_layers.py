"""Sample calls of whole layers: products, recurrent networks, experts, images, losses, random numbers."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from tests.sharding.brute_force import Sample, sample
from tests.sharding.make import bools, distinct, ints, positive, x
from torch import Tensor

from shardwise.capture import experts, operators

aten = torch.ops.aten


def layer_samples() -> list[Sample]:
    return [
        *einsums(),
        *products(),
        *matrices(),
        *random(),
        *moe(),
        *convolutions(),
        *pools(),
        *images(),
        *norms(),
        *recurrent(),
        *attentions(),
        *bags(),
        *alignments(),
        *entropies(),
        *losses(),
    ]


def einsums() -> Iterator[Sample]:
    yield sample(aten.einsum.default, "ij,jk->ik", [x(4, 6), x(6, 5)])
    yield sample(aten.einsum.default, "ij, jk", [x(4, 6), x(6, 5)])
    yield sample(aten.einsum.default, "bhqd,bkhd->bhqk", [x(2, 3, 5, 4), x(2, 6, 3, 4)])
    yield sample(aten.einsum.default, "...j,...jk->...k", [x(4, 3, 6), x(3, 6, 5)])
    yield sample(aten.einsum.default, "b...,...->b", [x(4, 3, 5), x(3, 5)])
    yield sample(aten.einsum.default, "bij->ji", [x(4, 3, 5)])
    yield sample(aten.einsum.default, "...ii->...i", [x(3, 4, 4)])
    yield sample(aten.einsum.default, "ii", [x(4, 4)])
    yield sample(aten.einsum.default, "i,j,k->kji", [x(4), x(3), x(5)])
    yield sample(aten.einsum.default, "ij,ij->i", [x(1, 6), x(4, 6)])
    yield sample(aten.einsum.default, "bcA,cBA->Bb", [x(4, 3, 5), x(3, 2, 5)])


def products() -> Iterator[Sample]:
    for name in ("dot", "vdot", "inner"):
        yield sample(getattr(aten, name).default, x(6), x(6))
    yield sample(aten.inner.default, x(4, 3, 6), x(5, 6))
    yield sample(aten.inner.default, x(4, 3), x())
    yield sample(aten.mv.default, x(4, 6), x(6))
    for name in ("outer", "ger"):
        yield sample(getattr(aten, name).default, x(4), x(5))
    yield sample(aten.linalg_vecdot.default, x(4, 3, 5), x(3, 5))
    yield sample(aten.linalg_vecdot.default, x(4, 5), x(4, 5), dim=0)
    yield sample(aten.linalg_matmul.default, x(4, 3, 5), x(5, 6))
    yield sample(aten.tensordot.default, x(4, 3, 5), x(5, 3, 6), [1, 2], [1, 0])
    yield sample(aten.tensordot.default, x(4, 5), x(5, 6), [-1], [0])
    yield sample(aten.chain_matmul.default, [x(4, 3), x(3, 5), x(5, 6)])
    yield sample(aten.linalg_multi_dot.default, [x(3), x(3, 5), x(5, 6)])
    yield sample(aten.linalg_multi_dot.default, [x(4, 3), x(3, 5), x(5, 6), x(6)])
    yield sample(aten.addmv.default, x(4), x(4, 6), x(6), beta=0.5)
    yield sample(aten.addr.default, x(4, 5), x(4), x(5), alpha=2)
    yield sample(aten.addr.default, x(5), x(4), x(5))
    yield sample(aten.addbmm.default, x(4, 5), x(3, 4, 6), x(3, 6, 5))
    yield sample(aten.bilinear.default, x(4, 5), x(4, 6), x(3, 5, 6), x(3))
    yield sample(aten.bilinear.default, x(4, 2, 5), x(4, 2, 6), x(3, 5, 6))
    yield sample(aten._trilinear.default, x(4, 5), x(3, 5, 6), x(4, 6), [1, 3], [0], [1, 2], [2, 3])


_OF_ONE = (
    *("linalg_inv", "inverse", "linalg_det", "det", "logdet", "linalg_slogdet", "slogdet", "linalg_cholesky", "cholesky", "linalg_qr"),
    *("cholesky_inverse", "linalg_svd", "svd", "linalg_svdvals", "linalg_eigh", "linalg_eigvalsh", "linalg_matrix_exp", "matrix_exp"),
    *("pinverse", "linalg_lu", "linalg_cond"),
)


def matrices() -> Iterator[Sample]:
    for name in _OF_ONE:
        yield sample(getattr(aten, name).default, _positive_definite(4, 3))
    for name in ("linalg_inv_ex", "linalg_cholesky_ex", "linalg_lu_factor"):
        yield sample(getattr(aten, name).default, _positive_definite(4, 3))
    for name in ("matrix_power", "linalg_matrix_power"):
        yield sample(getattr(aten, name).default, _positive_definite(4, 3), 3)
    yield sample(aten.linalg_pinv.default, x(4, 3, 2), 1e-9)
    for name in ("atol_rtol_tensor", "atol_rtol_float"):
        yield sample(getattr(aten.linalg_pinv, name), x(4, 3, 2))
    yield sample(aten.linalg_matrix_rank.atol_rtol_tensor, x(4, 3, 2))
    yield sample(aten.linalg_solve.default, _positive_definite(4, 3), x(4, 3, 5))
    yield sample(aten.linalg_solve.default, _positive_definite(4, 3), x(3, 5))
    yield sample(aten.linalg_solve.default, _positive_definite(4, 3), x(4, 3))
    yield sample(aten.linalg_solve_triangular.default, _positive_definite(4, 3), x(4, 3, 5), upper=True)
    yield sample(aten.triangular_solve.default, x(4, 3, 5), _positive_definite(4, 3))
    yield sample(aten.cholesky_solve.default, x(4, 3, 5), _positive_definite(4, 3))
    matrix, pivots = torch.linalg.lu_factor(_positive_definite(4, 3))
    yield sample(aten.linalg_lu_solve.default, matrix, pivots, x(4, 3, 5))


def _positive_definite(count: int, size: int) -> Tensor:
    """[count, size, size], well conditioned."""
    root = 0.3 * x(count, size, size)
    return root @ root.mT + torch.diag_embed(torch.arange(1, size + 1, dtype=torch.float64))


def random() -> Iterator[Sample]:
    state = torch.tensor([123456789012345, 0])
    real, whole = torch.float64, torch.int64
    for distribution, parameters, dtype in (
        *(("uniform", (-1.0, 2.0), real), ("normal", (1.0, 2.0), real), ("exponential", (2.0,), real), ("cauchy", (0.0, 1.0), real)),
        *(("log_normal", (0.0, 1.0), real), ("geometric", (0.3,), real), ("bernoulli", (0.3, 2.0), real)),
        *(("integers", (-3, 9), whole), ("integers", (0, 2**40), whole)),
    ):
        yield sample(operators.keyed_draw, state, [4, 3, 6], distribution, list(parameters), dtype, key=3)
    yield sample(operators.keyed_draw, state, [7], "uniform", [0.0, 1.0], torch.float32, key=3)
    yield sample(operators.keyed_draw, state, [], "normal", [0.0, 1.0], real, key=3)
    yield sample(operators.keyed_permutation, state, 8, whole, key=2)
    yield sample(operators.keyed_multinomial, positive(4, 7), state, 3, False, key=2)
    yield sample(operators.keyed_multinomial, positive(4, 7), state, 9, True, key=2)
    yield sample(operators.keyed_multinomial, positive(7), state, 3, True, key=2)


def moe() -> Iterator[Sample]:
    yield sample(experts.expert_mm, x(7, 4), x(5, 4, 6), ints(5, 7))
    yield sample(experts.expert_mm, x(8, 3), x(6, 3, 2), ints(8, 8))
    yield sample(experts.group_of_row, torch.tensor([2, 2, 5]), 7)


def convolutions() -> Iterator[Sample]:
    yield sample(aten.conv1d.padding, x(4, 6, 9), x(5, 6, 3), None, [1], "same")
    yield sample(aten.conv3d.padding, x(2, 4, 3, 5, 6), x(5, 4, 2, 2, 2), x(5), [1, 1, 1], "valid")
    yield sample(aten.conv2d.default, x(3, 8, 9), x(5, 3, 3, 2), x(5))
    yield sample(aten.conv2d.default, x(2, 3, 8, 12), x(5, 3, 2, 3), x(5), [2, 3])
    yield sample(aten.conv2d.default, x(2, 3, 8, 7), x(5, 3, 2, 2), x(5), [2, 2], [0, 0], [2, 1])
    yield sample(aten.conv_transpose2d.input, x(2, 6, 4, 3), x(6, 5, 3, 3), x(5), [2, 1], [1, 0], [1, 0], 1, [1, 2])
    yield sample(aten.conv_transpose3d.input, x(2, 6, 2, 3, 4), x(6, 4, 2, 2, 2), x(8), [2, 2, 2], [0, 0, 0], [0, 0, 0], 2)
    yield sample(aten.convolution.default, x(4, 6, 9), x(5, 6, 3), x(5), [1], [1], [2], False, [0], 1)
    yield sample(aten.convolution.default, x(4, 6, 5), x(6, 2, 3), None, [2], [1], [1], True, [1], 3)
    flags = [False, False, True, True]
    yield sample(aten._convolution.default, x(4, 6, 9), x(4, 3, 3), x(4), [1], [1], [1], False, [0], 2, *flags)


def pools() -> Iterator[Sample]:
    yield sample(aten.max_pool1d.default, x(4, 3, 8), [2])
    yield sample(aten.max_pool1d.default, x(4, 3, 9), [3], [1], [1])
    yield sample(aten.max_pool2d.default, x(4, 3, 8, 10), [2, 3], [1, 3], [0, 1], [2, 1])
    yield sample(aten.max_pool3d.default, x(2, 3, 4, 6, 5), [2, 2, 2])
    yield sample(aten.max_pool1d_with_indices.default, x(4, 3, 8), [2])
    yield sample(aten.max_pool2d_with_indices.default, x(4, 3, 8, 10), [2, 2])
    yield sample(aten.max_pool3d_with_indices.default, x(2, 3, 4, 6, 4), [2, 2, 2])
    yield sample(aten.avg_pool1d.default, x(4, 3, 9), [3])
    yield sample(aten.avg_pool2d.default, x(3, 8, 10), [3, 2], [2, 2], [1, 0], True, False)
    yield sample(aten.avg_pool3d.default, x(2, 3, 4, 6, 4), [2, 2, 2])
    yield sample(aten.adaptive_avg_pool3d.default, x(2, 3, 4, 6, 5), [2, 3, 2])
    yield sample(aten._adaptive_avg_pool2d.default, x(2, 3, 4, 6), [2, 3])
    yield sample(aten._adaptive_avg_pool3d.default, x(2, 3, 4, 6, 5), [2, 3, 2])
    yield sample(aten.adaptive_max_pool1d.default, x(4, 3, 8), [2])
    yield sample(aten.adaptive_max_pool2d.default, x(4, 3, 8, 9), [2, 2])
    yield sample(aten.adaptive_max_pool3d.default, x(2, 3, 4, 6, 5), [2, 3, 2])
    for name, shape in (("max_unpool2d", (4, 6)), ("max_unpool3d", (4, 6, 2))):
        pool = getattr(torch.nn.functional, name.replace("un", ""))
        values, indices = pool(x(2, 3, *shape), 2, return_indices=True)
        more = [[2, 2, 2], [0, 0, 0]] if len(shape) == 3 else []
        yield sample(getattr(aten, name).default, values, indices, list(shape), *more)


def images() -> Iterator[Sample]:
    """Interpolation and look-ups between pixels."""
    for rank in (1, 2, 3):
        shape = (2, 3, 5, 4, 3)[: 2 + rank]
        for name in ("upsample_nearest", "_upsample_nearest_exact"):
            target = getattr(aten, f"{name}{rank}d")
            yield sample(target.vec, x(*shape), None, [2.0] * rank)
            yield sample(target.default, x(*shape), [7, 8, 3][:rank])
    for name, rank in (("linear1d", 1), ("bilinear2d", 2), ("trilinear3d", 3), ("bicubic2d", 2), ("bilinear2d_aa", 2), ("bicubic2d_aa", 2)):
        target = getattr(aten, f"{'_' if name.endswith('aa') else ''}upsample_{name}")
        shape = (2, 3, 5, 4, 3)[: 2 + rank]
        yield sample(target.vec, x(*shape), None, False, [2.0] * rank)
        yield sample(target.default, x(*shape), [7, 8, 3][:rank], True)
    grid = x(2, 4, 5, 2).tanh()
    for target in (aten.grid_sampler, aten.grid_sampler_2d):
        yield sample(target.default, x(2, 3, 6, 7), grid, 0, 0, False)
    yield sample(aten.grid_sampler_3d.default, x(2, 3, 4, 5, 6), x(2, 4, 5, 3, 3).tanh(), 0, 1, True)
    yield sample(aten.affine_grid_generator.default, x(4, 2, 3), [4, 3, 5, 6], False)
    yield sample(aten.affine_grid_generator.default, x(4, 3, 4), [4, 2, 3, 5, 2], True)


def norms() -> Iterator[Sample]:
    yield sample(aten.native_layer_norm.default, x(4, 3, 5), [5], x(5), x(5), 1e-5)
    yield sample(aten._fused_rms_norm.default, x(4, 3, 5), [5], x(5), 1e-5)
    yield sample(aten.instance_norm.default, x(4, 5, 6), x(5), x(5), None, None, True, 0.1, 1e-5, False)
    yield sample(aten.instance_norm.default, x(4, 5, 3, 2), None, None, None, None, True, 0.1, 1e-5, False)
    for shape in ((4, 5, 6), (6, 3, 5, 2)):
        vectors = [x(shape[1]) for _ in range(3)]
        frozen = (3, 4)
        yield sample(operators.instance_norm, x(*shape), *vectors, positive(shape[1]), 0.1, 1e-5, frozen=frozen)
        yield sample(operators.batch_norm_fixed, x(*shape), *vectors, positive(shape[1]), 1e-5, frozen=frozen)
        yield sample(operators.batch_norm_alone, x(*shape), *vectors[:2], 1e-5)
    yield sample(operators.batch_norm_alone, x(6, 5), None, None, 1e-5)
    yield sample(operators.weight_norm, x(4, 5), x(4, 1), 0)
    yield sample(operators.weight_norm, x(4, 5, 3), x(1, 5, 1), 1)
    yield sample(operators.weight_norm, x(4, 5), x(), -1)


def entropies() -> Iterator[Sample]:
    for target in (operators.cross_entropy_sum, operators.cross_entropy_each):
        for weight, ignore, smoothing in ((None, -100, 0.0), (positive(7), 3, 0.0), (None, 3, 0.1), (positive(7), -100, 0.2)):
            yield sample(target, x(4, 7), labels(7, 4, ignored=ignore), weight, ignore, smoothing, frozen=(2,))
        yield sample(target, x(4, 8, 3), labels(8, 4, 3), positive(8), -100, 0.1, frozen=(2,))
        yield sample(target, x(6), torch.tensor(2), None, -100, 0.1)
        yield sample(target, x(4, 7), positive(4, 7).softmax(1), None, -100, 0.0)
        yield sample(target, x(4, 7, 3), positive(4, 7, 3).softmax(1), positive(7), -100, 0.1, frozen=(2,))
        yield sample(target, x(6), positive(6).softmax(0), None, -100, 0.0, frozen=(1,))
    for target in (operators.nll_sum, operators.nll_each):
        yield sample(target, x(4, 7), labels(7, 4), None, -100)
        yield sample(target, x(4, 8, 3), labels(8, 4, 3, ignored=2), positive(8), 2, frozen=(2,))
        yield sample(target, x(6), torch.tensor(2), None, -100)
    yield sample(operators.valid_count, labels(7, 6, ignored=2), positive(7), 2, torch.float64)


def labels(classes: int, *shape: int, ignored: int = -100) -> Tensor:
    """With ignored ones, most in the first rows."""
    found = ints(classes, *shape)
    return torch.where(torch.arange(found.numel()).reshape(shape) % 5 == 1, ignored, found)


def losses() -> Iterator[Sample]:
    for reduction in (0, 1, 2):
        for name in ("huber_loss", "soft_margin_loss", "smooth_l1_loss"):
            yield sample(getattr(aten, name).default, x(4, 5), x(4, 5), reduction, frozen=(1,))
        chance = positive(4, 5) / 9
        yield sample(aten.binary_cross_entropy.default, chance, bools(4, 5).double(), positive(5), reduction, frozen=(1, 2))
        yield sample(aten.kl_div.default, x(4, 5), positive(4, 5), reduction)
        yield sample(aten.hinge_embedding_loss.default, x(4, 5), bools(4, 5) * 2 - 1, 1.5, reduction)
        yield sample(aten.margin_ranking_loss.default, x(4, 1), x(4, 5), bools(5) * 2 - 1, 0.5, reduction)
        yield sample(aten.poisson_nll_loss.default, x(4, 5), positive(4, 5), True, True, 1e-8, reduction, frozen=(1,))
        yield sample(aten.cosine_embedding_loss.default, x(4, 5), x(4, 5), bools(4) * 2 - 1, 0.1, reduction)
        yield sample(aten.triplet_margin_loss.default, x(4, 5), x(4, 5), x(4, 5), 1.0, 2.0, 1e-6, False, reduction)
        yield sample(aten.multilabel_margin_loss.default, x(4, 5), _several(5, 4), reduction)
        yield sample(aten.multi_margin_loss.default, x(4, 5), ints(5, 4), 1, 1.0, positive(5), reduction, frozen=(2,))
    yield sample(aten.kl_div.default, x(4, 5), x(4, 5), log_target=True)
    yield sample(aten.triplet_margin_loss.default, x(4, 3, 5), x(4, 3, 5), x(4, 3, 5), swap=True)
    yield sample(aten.triplet_margin_loss.default, x(4, 5), x(4, 5), x(1, 5))
    yield sample(aten.mse_loss.default, x(4, 5), x(1, 5), frozen=(1,))
    logits = (x(4, 3, 5), bools(4, 3, 5).double())
    yield sample(aten.binary_cross_entropy_with_logits.default, *logits, positive(3, 1), positive(5), frozen=(1, 2, 3))


def _several(classes: int, rows: int) -> Tensor:
    """For each row two labels, then −1."""
    found = torch.full((rows, classes), -1)
    found[:, :2] = distinct(classes, rows, 2)
    return found


def recurrent() -> Iterator[Sample]:
    two, one = [x(4, 4, 6), x(4, 4, 6)], x(1, 4, 6)
    whole = torch.ops.shardwise.recurrent.default
    yield sample(whole, x(7, 4, 5), [x(1, 4, 6), x(1, 4, 6)], _weights(4, 5, 6, 1), None, "lstm", False, 1, False, False)
    deep = _weights(4, 5, 6, 2, both_ways=True, biases=True)
    yield sample(whole, x(4, 7, 5), two, deep, None, "lstm", True, 2, True, True, frozen=range(3, 19))
    yield sample(whole, x(4, 7, 5), two, deep, torch.tensor([3, 7, 1, 6]), "lstm", True, 2, True, True, frozen=range(3, 19))
    yield sample(whole, x(7, 4, 5), [one], _weights(3, 5, 6, 1, biases=True), None, "gru", True, 1, False, False, frozen=(4, 5))
    for name in ("rnn_tanh", "rnn_relu"):
        yield sample(whole, x(4, 7, 5), [one], _weights(1, 5, 6, 1), None, name, False, 1, False, True)
        yield sample(
            getattr(aten, name).data, x(7, 5), torch.tensor([3, 3, 1]), x(1, 3, 6), _weights(1, 5, 6, 1), False, 1, 0.0, True, False
        )
        yield sample(getattr(aten, f"{name}_cell").default, x(4, 5), x(4, 6), *_weights(1, 5, 6, 1))
    sizes = torch.tensor([3, 3, 1])
    yield sample(aten.lstm.data, x(7, 5), sizes, [x(1, 3, 6), x(1, 3, 6)], _weights(4, 5, 6, 1), False, 1, 0.0, True, False)
    yield sample(aten.gru.data, x(7, 5), sizes, x(1, 3, 6), _weights(3, 5, 6, 1), False, 1, 0.0, True, False)
    yield sample(aten.lstm_cell.default, x(4, 5), [x(4, 6), x(4, 6)], *_weights(4, 5, 6, 1), x(24), x(24), frozen=(5, 6))
    yield sample(aten.gru_cell.default, x(4, 5), x(4, 6), *_weights(3, 5, 6, 1))


def _weights(gates: int, inner: int, hidden: int, layers: int, *, both_ways: bool = False, biases: bool = False) -> list[Tensor]:
    found: list[Tensor] = []
    for layer in range(layers):
        for _ in range(1 + both_ways):
            width = inner if layer == 0 else hidden * (1 + both_ways)
            found += [x(gates * hidden, width), x(gates * hidden, hidden)]
            found += [x(gates * hidden), x(gates * hidden)] if biases else []
    return found


def attentions() -> Iterator[Sample]:
    """With a causal mask, and other numbers of queries than keys."""
    target = aten.scaled_dot_product_attention.default
    for queries, keys in ((8, 6), (6, 9)):
        yield sample(target, x(2, 3, queries, 4), x(2, 3, keys, 4), x(2, 3, keys, 5), None, 0.0, True, scale=0.4)
    yield sample(target, x(2, 4, 6, 4), x(2, 2, 6, 4), x(2, 2, 6, 4), None, 0.0, True, enable_gqa=True)


def bags() -> Iterator[Sample]:
    for mode in ("sum", "mean", "max"):
        yield sample(operators.bag_of_rows, x(7, 6), ints(7, 4, 5), None, mode, 3, False)
        yield sample(operators.bag_of_rows, x(8, 3), ints(8, 5, 4), None, mode, None, False)
    yield sample(operators.bag_of_rows, x(7, 6), ints(7, 4, 5), x(4, 5), "sum", None, False)
    yield sample(operators.bag_of_rows, x(7, 6), ints(7, 4, 5), None, "sum", None, True)
    starts = torch.tensor([0, 3, 3, 7])
    for mode in ("sum", "mean", "max"):
        yield sample(operators.bag_of_runs, x(7, 6), ints(7, 9), starts, None, mode, 2, False, False)
    yield sample(operators.bag_of_runs, x(7, 6), ints(7, 9), torch.tensor([0, 4, 9]), x(9), "sum", None, False, True)


def alignments() -> Iterator[Sample]:
    target, scores = torch.ops.shardwise.ctc_losses.default, x(9, 4, 5).log_softmax(-1)
    lengths = torch.tensor([9, 7, 9, 8])
    yield sample(target, scores, ints(4, 4, 3) + 1, lengths, torch.tensor([3, 2, 1, 2]), 0, False)
    yield sample(target, scores, ints(4, 8) + 1, lengths, torch.tensor([3, 2, 1, 2]), 0, True)
