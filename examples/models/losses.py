"""One small model for each loss, with a batch.

Every function returns (model, batch), seeded; `model(**batch)` is the loss. A loss is a mean or a sum over some of: samples, places,
classes, pairs of samples; what is left out, and what it is divided by, differs unevenly between the samples.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = [
    "barlow_twins",
    "bce",
    "bce_with_logits",
    "byol",
    "class_weights",
    "cosine_embedding",
    "cross_entropy_sum",
    "ctc_lists",
    "ctc_tensors",
    "dice",
    "distillation",
    "focal",
    "gaussian_nll",
    "huber",
    "ignored_labels",
    "image_cross_entropy",
    "info_nce",
    "kl_divergence",
    "l1",
    "label_smoothing",
    "margin_ranking",
    "mixture_likelihood",
    "mse",
    "multi_margin",
    "multilabel_margin",
    "multilabel_soft_margin",
    "nll",
    "pairwise_distance",
    "poisson_nll",
    "policy_gradient",
    "sample_weights",
    "smooth_l1",
    "soft_labels",
    "soft_margin",
    "supervised_contrastive",
    "token_log_likelihood",
    "triplet_margin",
    "vicreg",
    "z_loss",
]

Batch = dict[str, Tensor]
Example = tuple[nn.Module, Batch]
Loss = Callable[..., Tensor]

SAMPLES, FEATURES, CLASSES = 8, 16, 12


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(1)


def _floats(*shape: int) -> Tensor:
    return torch.randn(SAMPLES, *shape, generator=_generator())


def _classes(*shape: int) -> Tensor:
    return torch.randint(0, CLASSES, (SAMPLES, *shape), generator=torch.Generator().manual_seed(2))


class Predicted(nn.Module):
    """A two-layer network's prediction and the other inputs, through a loss."""

    def __init__(self, loss: Loss, outputs: int = CLASSES) -> None:
        super().__init__()
        self.loss = loss
        self.net = nn.Sequential(nn.Linear(FEATURES, 32), nn.GELU(), nn.Linear(32, outputs))

    def forward(self, x: Tensor, **others: Tensor) -> Tensor:
        return self.loss(self.net(x), **others)


class Compared(nn.Module):
    """The same network on two or three inputs, whose results are compared by a loss."""

    def __init__(self, loss: Loss, outputs: int = CLASSES) -> None:
        super().__init__()
        self.loss = loss
        self.net = nn.Sequential(nn.Linear(FEATURES, 32), nn.ReLU(), nn.Linear(32, outputs))

    def forward(self, x: Tensor, y: Tensor, z: Tensor | None = None, **others: Tensor) -> Tensor:
        found = [self.net(each) for each in (x, y, z) if each is not None]
        return self.loss(*found, **others)


def _predicted(loss: Loss, outputs: int = CLASSES, **others: Tensor) -> Example:
    """Features [n, …, f] of the rank of the first other input, and these."""
    torch.manual_seed(0)
    return Predicted(loss, outputs).train(), {"x": _floats(FEATURES), **others}


def _tokens(loss: Loss, **others: Tensor) -> Example:
    """Features of six tokens a sample, and the other inputs."""
    torch.manual_seed(0)
    return Predicted(loss).train(), {"x": _floats(6, FEATURES), **others}


def _compared(loss: Loss, inputs: int = 2, **others: Tensor) -> Example:
    """Two (or three) near views of each sample."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(3)
    views = {name: _floats(FEATURES) + torch.randn(SAMPLES, FEATURES, generator=generator) for name in "xyz"[:inputs]}
    return Compared(loss).train(), {**views, **others}


# Classes.


def label_smoothing() -> Example:
    """Cross entropy with a little probability for every class."""
    return _predicted(lambda logits, labels: F.cross_entropy(logits, labels, label_smoothing=0.1), labels=_classes())


def ignored_labels() -> Example:
    """The mean is over the labels that count, unevenly many for each sample; one sample has none."""
    labels = _classes(6)
    labels[0, 2:] = labels[3] = labels[5, :4] = -100
    return _tokens(lambda logits, labels: F.cross_entropy(logits.flatten(0, 1), labels.flatten()), labels=labels)


class Weighted(nn.Module):
    """Classes that count differently; the mean divides by the weights of the labels met."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(FEATURES, CLASSES)
        self.loss = nn.CrossEntropyLoss(weight=torch.linspace(0.2, 2.0, CLASSES), label_smoothing=0.1, ignore_index=3)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        return self.loss(self.net(x), labels)


def class_weights() -> Example:
    """Class weights, label smoothing and an ignored class at once."""
    torch.manual_seed(0)
    return Weighted().train(), {"x": _floats(FEATURES), "labels": _classes()}


def soft_labels() -> Example:
    """Cross entropy with probabilities as labels (mixup)."""
    return _predicted(lambda logits, labels: F.cross_entropy(logits, labels), labels=_floats(CLASSES).softmax(-1))


def image_cross_entropy() -> Example:
    """Logits [n, classes, height, width], a label for each pixel, some ignored."""
    torch.manual_seed(0)
    labels = _classes(4, 4)
    labels[0, 1:] = 255
    model = Predicted(lambda logits, labels: F.cross_entropy(logits, labels, ignore_index=255))
    model.net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, CLASSES, 1))
    return model.train(), {"x": _floats(3, 4, 4), "labels": labels}


def cross_entropy_sum() -> Example:
    """The sum over the tokens, divided by a number in the batch."""
    total = torch.full((SAMPLES,), 48.0)
    return _tokens(
        lambda logits, labels, total: F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum") / total[0],
        labels=_classes(6),
        total=total,
    )


def sample_weights() -> Example:
    """A weight for each sample (reduction "none"), divided by their sum."""

    def loss(logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
        return (F.cross_entropy(logits, labels, reduction="none") * weights).sum() / weights.sum()

    return _predicted(loss, labels=_classes(), weights=torch.linspace(0, 2, SAMPLES))


def nll() -> Example:
    """Logarithms of probabilities, negative log-likelihood."""
    return _predicted(lambda logits, labels: F.nll_loss(F.log_softmax(logits, -1), labels), labels=_classes())


def token_log_likelihood() -> Example:
    """The chosen tokens' logarithms by gather, a mean for each sample, then over the samples (as in preference learning)."""

    def loss(logits: Tensor, labels: Tensor, counted: Tensor) -> Tensor:
        chosen = logits.log_softmax(-1).gather(-1, labels[..., None]).squeeze(-1)
        means = (chosen * counted).sum(-1) / counted.sum(-1)
        return -F.logsigmoid(means[: SAMPLES // 2] - means[SAMPLES // 2 :]).mean()

    counted = torch.arange(6) < torch.tensor([6, 2, 4, 5, 1, 3, 6, 4])[:, None]
    return _tokens(loss, labels=_classes(6), counted=counted)


def z_loss() -> Example:
    """Cross entropy and the squared logarithm of the normaliser."""

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits, labels) + 1e-2 * logits.logsumexp(-1).square().mean()

    return _predicted(loss, labels=_classes())


def focal() -> Example:
    """Cross entropy scaled down where the probability is already high."""

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        each = F.cross_entropy(logits, labels, reduction="none")
        return ((1 - torch.exp(-each)) ** 2 * each).mean()

    return _predicted(loss, labels=_classes())


def distillation() -> Example:
    """Divergence from a frozen teacher's softened probabilities, and cross entropy."""
    torch.manual_seed(0)
    return Distilled().train(), {"x": _floats(FEATURES), "labels": _classes()}


class Distilled(nn.Module):
    """A small student of a larger, frozen teacher."""

    def __init__(self, temperature: float = 2.0) -> None:
        super().__init__()
        self.temperature = temperature
        self.teacher = nn.Sequential(nn.Linear(FEATURES, 64), nn.ReLU(), nn.Linear(64, CLASSES)).requires_grad_(False)
        self.student = nn.Linear(FEATURES, CLASSES)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        logits = self.student(x)
        with torch.no_grad():
            wanted = (self.teacher(x) / self.temperature).log_softmax(-1)
        soft = F.kl_div((logits / self.temperature).log_softmax(-1), wanted, reduction="batchmean", log_target=True)
        return soft * self.temperature**2 + F.cross_entropy(logits, labels)


def bce() -> Example:
    """Probabilities and zeros or ones."""
    return _predicted(lambda logits, y: F.binary_cross_entropy(logits.sigmoid(), y), y=(_floats(CLASSES) > 0).float())


def bce_with_logits() -> Example:
    """Rare labels weigh more (pos_weight), and each sample has a weight."""

    def loss(logits: Tensor, y: Tensor, weights: Tensor) -> Tensor:
        rare = torch.linspace(1, 4, CLASSES, device=logits.device, dtype=logits.dtype)
        return F.binary_cross_entropy_with_logits(logits, y, weight=weights[:, None], pos_weight=rare)

    return _predicted(loss, y=(_floats(CLASSES) > 0).float(), weights=torch.linspace(0.5, 2, SAMPLES))


def kl_divergence() -> Example:
    """Divergence of distributions, divided by the batch size."""
    return _predicted(lambda x, y: F.kl_div(x.log_softmax(-1), y, reduction="batchmean"), y=_floats(CLASSES).softmax(-1))


def dice() -> Example:
    """One minus the overlap of soft and hard masks: a ratio of sums over the whole batch, and one for each sample."""

    def loss(logits: Tensor, y: Tensor) -> Tensor:
        guess = logits.sigmoid()
        whole = (2 * (guess * y).sum() + 1) / (guess.sum() + y.sum() + 1)
        each = (2 * (guess * y).sum(-1) + 1) / (guess.sum(-1) + y.sum(-1) + 1)
        return 2 - whole - each.mean()

    return _predicted(loss, y=(_floats(CLASSES) > 0.5).float())


def multi_margin() -> Example:
    """Hinge: every wrong class must stay below the right one by a margin."""
    return _predicted(lambda logits, labels: F.multi_margin_loss(logits, labels), labels=_classes())


def multilabel_margin() -> Example:
    """Hinge with several right classes, listed and ended by -1."""
    labels = torch.full((SAMPLES, CLASSES), -1)
    labels[:, 0], labels[::2, 1] = 3, 5
    return _predicted(lambda logits, labels: F.multilabel_margin_loss(logits, labels), labels=labels)


def multilabel_soft_margin() -> Example:
    """A logistic loss for each of several labels."""
    return _predicted(lambda logits, y: F.multilabel_soft_margin_loss(logits, y), y=(_floats(CLASSES) > 0).float())


def soft_margin() -> Example:
    """log(1 + exp(−y x)) of labels ±1."""
    return _predicted(lambda x, y: F.soft_margin_loss(x, y), y=_floats(CLASSES).sign())


# Numbers.


def mse() -> Example:
    """Squared error."""
    return _predicted(lambda x, y: F.mse_loss(x, y), y=_floats(CLASSES))


def l1() -> Example:
    """Absolute error, summed over the features and averaged over the samples."""
    return _predicted(lambda x, y: F.l1_loss(x, y, reduction="none").sum(-1).mean(), y=_floats(CLASSES))


def smooth_l1() -> Example:
    """Squared near zero, absolute elsewhere."""
    return _predicted(lambda x, y: F.smooth_l1_loss(x, y, beta=0.5), y=_floats(CLASSES))


def huber() -> Example:
    """The same times its width."""
    return _predicted(lambda x, y: F.huber_loss(x, y, delta=0.5), y=_floats(CLASSES))


def gaussian_nll() -> Example:
    """Mean and variance are predicted."""

    def loss(x: Tensor, y: Tensor) -> Tensor:
        mean, variance = x.chunk(2, -1)
        return F.gaussian_nll_loss(mean, y, F.softplus(variance))

    return _predicted(loss, y=_floats(CLASSES // 2))


def poisson_nll() -> Example:
    """Counts, whose rate's logarithm is predicted."""
    counts = torch.randint(0, 5, (SAMPLES, CLASSES), generator=_generator()).float()
    return _predicted(lambda x, y: F.poisson_nll_loss(x, y, log_input=True, full=True), y=counts)


def mixture_likelihood() -> Example:
    """A mixture of normal distributions: the logarithm of a sum of exponentials over its parts."""

    def loss(x: Tensor, y: Tensor) -> Tensor:
        weights, means, widths = x.unflatten(-1, (3, -1)).unbind(-2)
        each = torch.distributions.Normal(means, F.softplus(widths) + 0.1, validate_args=False).log_prob(y[:, None])
        return -torch.logsumexp(weights.log_softmax(-1) + each, -1).mean()

    return _predicted(loss, y=_floats())


# Pairs of samples, or of views of one.


def cosine_embedding() -> Example:
    """Pairs that should be alike or not, by a label ±1."""
    return _compared(lambda x, y, label: F.cosine_embedding_loss(x, y, label, margin=0.2), label=_floats().sign())


def margin_ranking() -> Example:
    """The first of two scores should be larger, or smaller, by a label ±1."""
    return _compared(lambda x, y, label: F.margin_ranking_loss(x.sum(-1), y.sum(-1), label, margin=0.5), label=_floats().sign())


def triplet_margin() -> Example:
    """An anchor nearer to the second than to the third input, by a margin."""
    return _compared(lambda x, y, z: F.triplet_margin_loss(x, y, z, margin=1.0), inputs=3)


def pairwise_distance() -> Example:
    """Distances of all samples to each other (torch.cdist), of both views alike."""
    return _compared(lambda x, y: F.mse_loss(torch.cdist(x, x), torch.cdist(y, y)) + F.pairwise_distance(x, y).mean())


def info_nce() -> Example:
    """Each sample must find its second view among those of the batch."""

    def loss(x: Tensor, y: Tensor) -> Tensor:
        scores = F.normalize(x, dim=-1) @ F.normalize(y, dim=-1).t() / 0.1
        labels = torch.arange(len(x), device=x.device)
        return (F.cross_entropy(scores, labels) + F.cross_entropy(scores.t(), labels)) / 2

    return _compared(loss)


def supervised_contrastive() -> Example:
    """All samples of one class attract each other; a sample alone in its class does not count."""

    def loss(x: Tensor, y: Tensor, labels: Tensor) -> Tensor:
        found = F.normalize(torch.cat([x, y]), dim=-1)
        classes = torch.cat([labels, labels])
        itself = torch.eye(len(found), dtype=torch.bool, device=x.device)
        scores = (found @ found.t() / 0.2).masked_fill(itself, -1e9)
        same = (classes[:, None] == classes[None, :]) & ~itself
        likely = scores - scores.logsumexp(-1, keepdim=True)
        return -((likely * same).sum(-1) / same.sum(-1).clamp(min=1)).mean()

    return _compared(loss, labels=_classes() % 3)


def barlow_twins() -> Example:
    """The correlation over the batch of the two views' features should be the identity."""

    def loss(x: Tensor, y: Tensor) -> Tensor:
        x, y = ((each - each.mean(0)) / each.std(0) for each in (x, y))
        correlation = x.t() @ y / len(x)
        diagonal = torch.diagonal(correlation)
        rest = correlation.square().sum() - diagonal.square().sum()
        return (diagonal - 1).square().sum() + 0.005 * rest

    return _compared(loss)


def vicreg() -> Example:
    """Views alike, every feature's spread over the batch at least one, features uncorrelated."""

    def loss(x: Tensor, y: Tensor) -> Tensor:
        total = 25 * F.mse_loss(x, y)
        for each in (x, y):
            spread = (each.var(0) + 1e-4).sqrt()
            centred = each - each.mean(0)
            covariance = centred.t() @ centred / (len(each) - 1)
            rest = covariance - torch.diag(torch.diag(covariance))
            total = total + 25 * F.relu(1 - spread).mean() + rest.square().sum() / each.shape[1]
        return total

    return _compared(loss)


class Byol(nn.Module):
    """One view's prediction of what a slowly following network (its parameters are buffers) makes of the other."""

    weight: Tensor
    bias: Tensor

    def __init__(self, rate: float = 0.01) -> None:
        super().__init__()
        self.rate = rate
        self.online = nn.Linear(FEATURES, CLASSES)
        self.predictor = nn.Sequential(nn.Linear(CLASSES, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, CLASSES))
        self.register_buffer("weight", self.online.weight.detach().clone())
        self.register_buffer("bias", self.online.bias.detach().clone())

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        with torch.no_grad():
            wanted = F.linear(y, self.weight, self.bias)
            self.weight.lerp_(self.online.weight, self.rate)
            self.bias.lerp_(self.online.bias, self.rate)
        return 2 - 2 * F.cosine_similarity(self.predictor(self.online(x)), wanted, dim=-1).mean()


def byol() -> Example:
    """A moving average of parameters, kept in buffers and changed in the forward pass."""
    torch.manual_seed(0)
    return Byol().train(), {"x": _floats(FEATURES), "y": _floats(FEATURES) + 0.1}


# Reinforcement learning.


class ActorCritic(nn.Module):
    """A policy and a value, trained by the clipped objective; advantages are normalised over the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.actor = nn.Sequential(nn.Linear(FEATURES, 32), nn.Tanh(), nn.Linear(32, CLASSES))
        self.critic = nn.Sequential(nn.Linear(FEATURES, 32), nn.Tanh(), nn.Linear(32, 1))

    def forward(self, x: Tensor, action: Tensor, before: Tensor, advantage: Tensor) -> Tensor:
        policy, value = torch.distributions.Categorical(logits=self.actor(x)), self.critic(x).squeeze(-1)
        ratio = (policy.log_prob(action) - before).exp()
        normal = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
        gain = torch.min(ratio * normal, ratio.clamp(0.8, 1.2) * normal).mean()
        return F.mse_loss(value, advantage) - gain - 0.01 * policy.entropy().mean()


def policy_gradient() -> Example:
    """torch.distributions, whose own checks of values are left out; ratios clipped on both sides."""
    torch.manual_seed(0)
    before = -2.5 + 0.1 * torch.randn(SAMPLES, generator=torch.Generator().manual_seed(3))
    return ActorCritic().train(), {"x": _floats(FEATURES), "action": _classes(), "before": before, "advantage": _floats()}


# Sequences without alignment.


def ctc_tensors() -> Example:
    """Connectionist temporal classification; lengths as inputs."""

    def loss(logits: Tensor, labels: Tensor, frames: Tensor, letters: Tensor) -> Tensor:
        return F.ctc_loss(logits.log_softmax(-1).transpose(0, 1), labels, frames, letters)

    frames, letters = torch.tensor([6, 6, 5, 4, 6, 6, 5, 6]), torch.tensor([2, 3, 1, 2, 3, 1, 2, 2])
    return _tokens(loss, labels=_classes(3).clamp(min=1), frames=frames, letters=letters)


def ctc_lists() -> Example:
    """The same with lengths that are constants of the model, in lists."""

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        count = len(logits)
        frames, letters = [6] * count, [2] * count
        return F.ctc_loss(logits.log_softmax(-1).transpose(0, 1), labels, frames, letters)  # type: ignore[arg-type]

    return _tokens(loss, labels=_classes(2).clamp(min=1))
