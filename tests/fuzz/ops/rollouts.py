"""Steps that repeat: integrators, recurrent cells, fixed points."""

import math

import torch
from draw import op


def field(x):
    return torch.sin(x) - 0.5 * x.roll(1, -1) * x


@op
def rk4(x, d):
    dt = d.value([0.05, 0.1, 0.2])
    for _ in range(d.integer(1, 3)):
        k1 = field(x)
        k2 = field(x + dt / 2 * k1)
        k3 = field(x + dt / 2 * k2)
        k4 = field(x + dt * k3)
        x = x + dt / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    return x


@op
def euler(x, d):
    for _ in range(d.integer(2, 8)):
        x = x + d.number(0, 0.2) * torch.cos(x) * (1 - x)
    return x


@op
def leapfrog(x, d):
    q, p = x, x.roll(1, -1) * 0.5
    for _ in range(d.integer(1, 4)):
        p = p - 0.05 * torch.sin(q)
        q = q + 0.1 * p
        p = p - 0.05 * torch.sin(q)
    return torch.cat([q, p], -1) if d.chance(0.5) else q


@op
def pendulum(x, d):
    v = d.cycled(x, 2)
    angle, speed = v[..., 0], v[..., 1]
    rows = []
    for _ in range(d.integer(1, 5)):
        speed = speed + 0.1 * (-9.8 * torch.sin(angle) + d.number())
        angle = angle + 0.1 * speed
        rows.append(torch.stack([angle, speed], -1))
    return torch.stack(rows, -2) if d.chance(0.5) else rows[-1]


@op
def cartpole(x, d):
    v = d.cycled(x, 4)
    q, dq, a, da = v.unbind(-1)
    for _ in range(d.integer(1, 2)):
        s, c = torch.sin(a), torch.cos(a)
        t = (d.number() + 0.05 * da**2 * s) / 1.1
        dda = (9.8 * s - c * t) / (0.5 * (4 / 3 - 0.1 * c**2 / 1.1))
        ddq = t - 0.05 * dda * c / 1.1
        q, dq, a, da = q + 0.02 * dq, dq + 0.02 * ddq, a + 0.02 * da, da + 0.02 * dda
    return torch.stack([q, dq, a, da], -1)


@op
def rnn(x, d):
    v = d.flat(x)
    w = d.tensor(2, 2)
    h = torch.stack([v[..., 0], v[..., -1]], -1)
    states = []
    for t in range(d.integer(2, 5)):
        h = torch.tanh(h @ w + v[..., t % v.shape[-1]].unsqueeze(-1))
        states.append(h)
    return torch.stack(states, -2) if d.chance(0.5) else h


@op(batched=False)
def rnn_of_weights(x, d):
    w = d.square(x, 2)
    h = d.tensor(2)
    for _ in range(d.integer(2, 5)):
        h = torch.tanh(w @ h)
    return h


@op(batched=False)
def lstm_cell(x, d):
    v = d.cycled(x, 4)
    w = [d.tensor(*shape) for shape in ((4, 1), (4, 1), (4,), (4,))]
    h = c = v.new_zeros(1, 1)
    states = []
    for t in range(d.integer(1, 4)):
        h, c = torch._VF.lstm_cell(v[t].reshape(1, 1), (h, c), *w)
        states.append(h)
    return torch.cat(states, 1)


@op(batched=False)
def gru_cell(x, d):
    v = d.cycled(x, 3)
    w = [d.tensor(*shape) for shape in ((3, 1), (3, 1), (3,), (3,))]
    h = v[:1].reshape(1, 1)
    for t in range(d.integer(1, 3)):
        h = torch._VF.gru_cell(v[t].reshape(1, 1), h, *w)
    return h * v


@op
def gates_by_hand(x, d):
    """An LSTM written out, weights shared by all steps."""
    v = d.flat(x)
    u, w = d.tensor(4), d.tensor(4)
    h = c = torch.zeros_like(v[..., 0])
    for t in range(min(d.integer(1, 4), v.shape[-1])):
        i, f, g, o = (v[..., t].unsqueeze(-1) * u + h.unsqueeze(-1) * w).unbind(-1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        h = torch.sigmoid(o) * torch.tanh(c)
    return h.unsqueeze(-1) * v


@op
def fixed_point(x, d):
    y = torch.zeros_like(x)
    for _ in range(d.integer(2, 6)):
        y = 0.5 * torch.cos(y + x)
    return y


@op
def newton_for_a_root(x, d):
    a = x.square() + 1
    y = torch.ones_like(x)
    for _ in range(d.integer(2, 4)):
        y = 0.5 * (y + a / y)
    return y


@op
def unrolled_gradient_descent(x, d):
    w = d.tensor(x.shape[-1], low=0.2)
    y = x
    for _ in range(d.integer(1, 3)):
        y = y - 0.1 * (w * y + torch.sin(y) * y.mean(-1, keepdim=True))
    return y


@op
def scan_with_stack(x, d):
    axis = d.axis(x)
    h, rows = None, []
    for part in x.unbind(axis):
        h = part if h is None else torch.tanh(0.5 * h + part)
        rows.append(h)
    return torch.stack(rows, axis)


@op
def power_series(x, d):
    y, term = torch.ones_like(x), torch.ones_like(x)
    for k in range(1, d.integer(3, 7)):
        term = term * x / k
        y = y + term
    return y


@op
def residual_layers(x, d):
    n = x.shape[-1]
    for _ in range(d.integer(1, 3)):
        x = x + torch.tanh(x @ d.tensor(n, n)) / math.sqrt(n)
    return x


@op
def coupled_particles(x, d):
    y = d.cycled(x, 3)
    for _ in range(d.integer(1, 2)):
        difference = y.unsqueeze(-1) - y.unsqueeze(-2)
        y = y - 0.1 * (difference / (1 + difference.square())).sum(-1)
    return y
