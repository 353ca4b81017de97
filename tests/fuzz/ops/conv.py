"""Convolutions, pooling, images."""

import torch
import torch.nn.functional as nnf
from draw import op


def signal(x, d, channels=2):
    """(batch, channels, length) of the first elements."""
    n = max(1, d.size(x) // channels)
    return d.cycled(x, channels * n).reshape(-1 if d.first else 1, channels, n)


def image(x, d):
    n = max(2, d.size(x) // 2)
    return d.cycled(x, 2 * n).reshape(-1 if d.first else 1, 1, 2, n)


@op
def conv1d(x, d):
    groups = d.choice([1, 1, 2])
    z = signal(x, d)
    w = d.tensor(2 * d.integer(1, 2), 2 // groups, d.integer(1, 2))
    return nnf.conv1d(z, w, d.tensor(w.shape[0]) if d.chance(0.3) else None, d.integer(1, 2), d.integer(0, 1), 1, groups)


@op
def conv1d_same(x, d):
    return nnf.conv1d(signal(x, d, 1), d.tensor(2, 1, 3), padding="same")


@op(batched=False)
def conv1d_of_weights(x, d):
    w = d.cycled(x, 4).reshape(2, 2, 1) * d.tensor(1, 1, 2)
    return nnf.conv1d(signal(x, d), w, d.cycled(x, 2) if d.chance(0.5) else None, 1, 1, d.integer(1, 2))


@op
def conv_transpose1d(x, d):
    groups = d.choice([1, 2])
    return nnf.conv_transpose1d(signal(x, d), d.tensor(2, 1, 2), stride=d.integer(1, 2), groups=groups)


@op
def conv2d(x, d):
    z = image(x, d)
    return nnf.conv2d(z, d.tensor(1, 1, d.integer(1, 2), d.integer(1, 2)), None, (1, d.integer(1, 2)), (0, d.integer(0, 1)))


@op(batched=False)
def conv2d_of_weights(x, d):
    w = d.cycled(x, 2).reshape(1, 1, 1, 2)
    return nnf.conv2d(image(x, d), w, None, 1, (0, d.integer(0, 1)))


@op
def depthwise(x, d):
    return nnf.conv1d(signal(x, d), d.tensor(2, 1, 2), groups=2, padding=1, dilation=d.integer(1, 2))


@op
def conv_then_pool(x, d):
    y = nnf.conv1d(signal(x, d), d.tensor(2, 2, 2), padding=1)
    return nnf.max_pool1d(nnf.relu(y), 2, 1)


@op
def max_pool(x, d):
    z = signal(x, d, 1)
    return d.choice(
        [
            lambda: nnf.max_pool1d(z, 3, d.integer(1, 3), d.integer(0, 1)),
            lambda: nnf.max_pool1d(z, 2, 1, 0, 2),
            lambda: nnf.max_pool2d(image(x, d), 2, 1),
            lambda: nnf.adaptive_max_pool1d(z, d.integer(1, 3)),
        ]
    )()


@op
def avg_pool(x, d):
    z = signal(x, d, 1)
    return d.choice(
        [
            lambda: nnf.avg_pool1d(z, 3, d.integer(1, 2), d.integer(0, 1), count_include_pad=d.chance(0.5)),
            lambda: nnf.avg_pool2d(image(x, d), (2, 2), 1, divisor_override=3),
            lambda: nnf.adaptive_avg_pool1d(z, d.integer(1, 3)),
            lambda: nnf.lp_pool1d(z.abs() + 0.1, 2.0, 2, 1),
        ]
    )()


@op
def interpolate(x, d):
    z, q = signal(x, d, 1), image(x, d)
    return d.choice(
        [
            lambda: nnf.interpolate(q, scale_factor=(1, 1.5), mode="bilinear", align_corners=d.chance(0.5)),
            lambda: nnf.interpolate(q, size=(3, 3), mode="nearest"),
            lambda: nnf.interpolate(z[..., :6], scale_factor=2, mode="linear", align_corners=True),
        ]
    )()


@op(batched=False)
def grid_sample(x, d):
    grid = d.cycled(x, 4).tanh().reshape(1, 1, 2, 2)
    return nnf.grid_sample(image(x, d), grid, align_corners=False, padding_mode=d.choice(["zeros", "border", "reflection"]))


@op
def pad(x, d):
    z = signal(x, d, 1)
    return d.choice(
        [
            lambda: nnf.pad(x, (d.integer(-1, 1), 2), value=d.number()),
            lambda: nnf.pad(z, (1, 1), mode="replicate"),
            lambda: nnf.pad(z, (1, 1), mode="reflect"),
            lambda: nnf.pad(d.matrix(x), (1, 0, 0, 1)),
        ]
    )()


@op
def image_columns(x, d):
    return d.choice(
        [
            lambda: nnf.unfold(image(x, d), (2, 2), padding=d.integer(0, 1)),
            lambda: nnf.fold(d.cycled(x, 4).reshape(-1 if d.first else 1, 4, 1).repeat(1, 1, 2), (2, 3), (2, 2)),
            lambda: nnf.pixel_shuffle(d.cycled(x, 8).reshape(-1 if d.first else 1, 4, 1, 2), 2),
        ]
    )()


@op
def channel_shuffle(x, d):
    return torch.channel_shuffle(d.cycled(x, 8).reshape(-1 if d.first else 1, 4, 2, 1), 2)
