"""Losses, with every reduction; over a batch none of them reduces across samples."""

import torch
import torch.nn.functional as nnf
from draw import op


def logits(x, d):
    """(rows, classes), and how to reduce: over a batch the rows are samples."""
    if d.first:
        return d.flat(x), "none"
    return x.reshape(-1, x.shape[-1]), d.choice(["none", "mean", "sum"])


def over_batch(y, z, d):
    return y.reshape(z.shape[0], -1) if d.first else y


@op
def cross_entropy(x, d):
    z, how = logits(x, d)
    n, m = z.shape
    weight = d.tensor(m, low=0.5) if d.chance(0.4) else None
    y = nnf.cross_entropy(z, d.indices((n,), m), weight, reduction=how, label_smoothing=d.choice([0, 0.1]))
    return over_batch(y, z, d)


@op
def cross_entropy_of_probabilities(x, d):
    z, how = logits(x, d)
    return over_batch(nnf.cross_entropy(z, d.tensor(*z.shape).softmax(1), reduction=how), z, d)


@op
def nll_loss(x, d):
    z, how = logits(x, d)
    n, m = z.shape
    how = "sum" if how == "mean" else how
    return over_batch(nnf.nll_loss(z.log_softmax(1), d.indices((n,), m), reduction=how, ignore_index=0), z, d)


@op
def squared_error(x, d):
    z, how = logits(x, d)
    return nnf.mse_loss(z, z.roll(1, -1), reduction=how)


@op
def robust_losses(x, d):
    z, how = logits(x, d)
    target = d.tensor(*z.shape)
    return d.choice(
        [
            lambda: nnf.smooth_l1_loss(z, target, reduction=how, beta=d.value([0.5, 1.0])),
            lambda: nnf.huber_loss(z, target, reduction=how, delta=d.number(0.5, 1)),
            lambda: nnf.l1_loss(z, target, reduction=how),
            lambda: nnf.soft_margin_loss(z, target.sign(), reduction=how),
            lambda: nnf.poisson_nll_loss(z, target.abs(), reduction=how),
            lambda: nnf.hinge_embedding_loss(z, target.sign(), reduction=how),
            lambda: nnf.gaussian_nll_loss(z, target, z.square() + 0.2, reduction=how),
        ]
    )()


@op
def binary_cross_entropy(x, d):
    z, how = logits(x, d)
    target = d.tensor(*z.shape, low=0, high=1)
    if d.chance(0.5):
        return nnf.binary_cross_entropy(torch.sigmoid(z), target, reduction=how)
    weight = d.tensor(z.shape[-1], low=0.5) if d.chance(0.5) else None
    return nnf.binary_cross_entropy_with_logits(z, target, reduction=how, pos_weight=weight)


@op
def kl_div(x, d):
    z, how = logits(x, d)
    return nnf.kl_div(z.log_softmax(-1), z.roll(1, -1).softmax(-1), reduction=how)


@op
def margin_losses(x, d):
    z, how = logits(x, d)
    n, m = z.shape
    y = d.choice(
        [
            lambda: nnf.multi_margin_loss(z, d.indices((n,), m), reduction=how),
            lambda: nnf.multilabel_soft_margin_loss(z, d.mask(z.shape).double(), reduction=how),
            lambda: nnf.triplet_margin_loss(z, d.tensor(n, m), z.roll(1, -1) + 0.1, reduction=how, eps=1e-2),
            lambda: nnf.margin_ranking_loss(z, z.roll(1, -1), d.tensor(n, m).sign(), reduction=how),
            lambda: nnf.cosine_embedding_loss(z + 2, d.tensor(n, m) + 2, d.tensor(n).sign(), reduction=how),
        ]
    )()
    return over_batch(y, z, d)


@op
def squared_hinge(x, d):
    z, _ = logits(x, d)
    return nnf.relu(1 - z * d.tensor(*z.shape).sign()).square()


@op
def picked_log_probability(x, d):
    """Cross entropy by hand: the log probabilities read at the labels."""
    z, _ = logits(x, d)
    return -z.log_softmax(-1).gather(-1, d.indices((z.shape[0], 1), z.shape[-1]))
