"""Scalar functions: their Hessians are sparse, banded, low rank or dense, and couple several inputs."""

import torch
from end_to_end.test_structure import hand_layer_norm, heat, scores, shift_chain
from support.zoo import Zoo

zoo = Zoo()


def rosenbrock(x):
    return (100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum()


@zoo.case("rosenbrock")
def _(r):
    return rosenbrock, r(9)


@zoo.case("sum of a pointwise function")
def _(r):
    return lambda x: (x.sin() * x.exp()).sum(), r(8)


@zoo.case("cross entropy")
def _(r):
    rows, t = torch.arange(5), torch.arange(5) % 3
    return lambda z: -(z.log_softmax(1)[rows, t]).mean(), r(5, 3)


@zoo.case("cross entropy by logsumexp")
def _(r):
    rows, t = torch.arange(5), torch.arange(5) % 3
    return lambda z: (z.logsumexp(1) - z[rows, t]).mean(), r(5, 3)


@zoo.case("cross entropy loss of a linear model")
def _(r):
    x, t = r(6, 3), torch.arange(6) % 4
    return lambda w, b: torch.nn.functional.cross_entropy(torch.nn.functional.linear(x, w, b), t), (r(4, 3), r(4))


@zoo.case("sum of squared probabilities")
def _(r):
    return lambda z: (z.softmax(1) ** 2).sum(), r(4, 3)


@zoo.case("logistic regression")
def _(r):
    x = r(8, 4)
    return lambda w, b: -(x @ w + b).sigmoid().log().sum(), (r(4), r(1))


@zoo.case("logistic regression with a ridge")
def _(r):
    x, y = r(8, 4), torch.sign(r(8))
    return lambda w: torch.log1p(torch.exp(-(x @ w) * y)).sum() + 0.5 * (w * w).sum(), r(4)


@zoo.case("MLP in its weights")
def _(r):
    x = r(5, 3)
    return lambda a, c, b: ((x @ a + c).tanh() @ b).pow(2).mean(), (r(3, 4), r(4), r(4, 2))


@zoo.case("MLP classifier in its weights")
def _(r):
    x, rows, t = r(5, 3), torch.arange(5), torch.arange(5) % 3
    return lambda a, c, b: -((x @ a + c).tanh() @ b).log_softmax(1)[rows, t].mean(), (r(3, 4), r(4), r(4, 3))


@zoo.case("MLP batch in its inputs")
def _(r):
    w1, w2 = r(3, 4), r(4, 4)
    return lambda x: (((x @ w1).tanh() @ w2).tanh() @ w2).tanh().sum(), r(5, 3)


@zoo.case("residual MLP in its inputs")
def _(r):
    w = r(4, 4) * 0.5

    def f(x):
        for _ in range(3):
            x = x + (x @ w).tanh()
        return (x**2).sum()

    return f, r(4, 4)


@zoo.case("spring energy")
def _(r):
    a, b = r.integers(0, 6, 9), r.integers(0, 6, 9)

    def f(x):
        d = x[a] - x[b]
        return ((((d * d).sum(1) + 0.1).sqrt() - 1) ** 2).sum()

    return f, r(6, 2)


@zoo.case("spring chain")
def _(r):
    a = torch.arange(9)
    return lambda x: ((((x[a] - x[a + 1]) ** 2).sum(1) + 0.1).sqrt() - 1).square().sum(), r(10, 2)


# Each point meets itself, with terms of size 96 that cancel in another order than torch's: float32 keeps fewer digits.
@zoo.case("pairwise potential", skip=("float32",))
def _(r):
    def f(x):
        d = x[:, None] - x[None]
        s = (d * d).sum(-1) + 0.5
        return (1 / s**3 - 1 / s).sum()

    return f, r(4, 3)


@zoo.case("Lennard-Jones over pairs")
def _(r):
    at = torch.combinations(torch.arange(5))

    def f(x):
        d = ((x[at[:, 0]] - x[at[:, 1]]) ** 2).sum(-1)
        inv = 1 / (d + 0.3) ** 3
        return 4 * (inv**2 - inv).sum()

    return f, r(5, 3)


@zoo.case("product of neighbours")
def _(r):
    return lambda x: (x[:-2] * x[1:-1] * x[2:]).sum(), r(9)


@zoo.case("phi-four lattice")
def _(r):
    return lambda u: ((u[1:] - u[:-1]) ** 2).sum() + ((u[:, 1:] - u[:, :-1]) ** 2).sum() + (u**4).sum(), r(4, 5)


@zoo.case("heat energy")
def _(r):
    return lambda u: heat(u).square().sum(), r(5, 5)


@zoo.case("quadratic form")
def _(r):
    a = r(5, 5)
    return lambda x: x @ (a @ x), r(5)


@zoo.case("matrix factorisation")
def _(r):
    x = r(5, 4)
    return lambda u, v: ((x - u @ v) ** 2).sum(), (r(5, 2), r(2, 4))


@zoo.case("layer norm energy")
def _(r):
    return lambda x: (hand_layer_norm(x) ** 3).sum(), r(3, 4)


@zoo.case("attention energy")
def _(r):
    wq, wk = r(4, 4), r(4, 4)
    return lambda x: (scores(x, wq, wk).softmax(-1) ** 2).sum(), r(2, 3, 4)


@zoo.case("convolution energy")
def _(r):
    k = r(3, 2)
    return lambda x: (x.unfold(1, 3, 1) @ k).tanh().sum(), r(2, 7)


@zoo.case("convolution residual energy")
def _(r):
    k = r(3)
    return lambda x: ((x.unfold(1, 3, 1) @ k).sin() + x[:, 1:-1]).pow(2).sum(), r(2, 7)


@zoo.case("square of an inner product")
def _(r):
    return lambda x, w: (x * w).sum() ** 2, (r(5), r(5))


@zoo.case("trace of a cube")
def _(r):
    return lambda a: (a @ a @ a).diagonal().sum(), r(3, 3)


@zoo.case("gathered and reshaped on both sides")
def _(r):
    a, b = r.integers(0, 6, 8), r.integers(0, 6, 8)

    def f(x):
        u = x[a].reshape(2, 4, 3).transpose(0, 1)[1:, :, ::2]
        v = x[b].reshape(2, 4, 3).transpose(0, 1)[1:, :, ::2]
        return (u.sin() * v).sum()

    return f, r(6, 3)


@zoo.case("reshape carry, twice")
def _(r):
    return lambda x: (x.reshape(-1)[1:-2].reshape(3, 3).exp() * x[:, 0].view(3, 1)).sum(), r(3, 4)


@zoo.case("transposed against straight")
def _(r):
    return lambda x: (x.t().reshape(2, 6).exp() * x.reshape(2, 6)).sum(), r(4, 3)


for _n in (1, 2, 3):

    @zoo.case(f"energy of {_n} shifts")
    def _(r, n=_n):
        return lambda x: (shift_chain(x, n) ** 2).sum(), r(9)


@zoo.case("chain of cats")
def _(r):
    def f(x):
        for _ in range(4):
            x = torch.cat([x[:1], x[1:] * x[:-1]], 0).sin()
        return x.sum()

    return f, r(8)


@zoo.case("recurrent net in its state")
def _(r):
    w, xs = r(4, 4) * 0.5, r(5, 4)

    def f(h):
        for k in range(5):
            h = (h @ w).tanh() + h * xs[k]
        return h.pow(2).sum()

    return f, r(3, 4)


@zoo.case("recurrent net in its weights")
def _(r):
    x = r(3, 4)

    def f(w):
        h = x
        for _ in range(4):
            h = (h @ w).tanh()
        return h.pow(2).sum()

    return f, r(4, 4)


@zoo.case("rank one")
def _(r):
    return lambda x: (x * x).sum().exp() * 0.01, r(8) * 0.1


@zoo.case("sum of an outer product")
def _(r):
    return lambda x: (x[:, None] * x[None]).sin().sum(), r(7)


@zoo.case("message passing energy")
def _(r):
    a, b, z = r.integers(0, 5, 8), r.integers(0, 5, 8), r.zeros(5, 2)

    def layer(x):
        return z.index_add(0, b, (x[a] - x[b]).tanh()) + x

    return lambda x: (layer(layer(x).sin()) ** 2).sum(), r(5, 2)


@zoo.case("rows in a Python loop")
def _(r):
    return lambda x: torch.stack([(x[i] * x[(i + 1) % 7]).sin() for i in range(7)]).sum(), r(7, 2)


@zoo.case("product of everything")
def _(r):
    return lambda x: x.prod() + x.prod(0).sum(), r(3, 2)


@zoo.case("Gaussian log likelihood")
def _(r):
    x = r(6, 3)

    def f(mean, log_scale):
        z = (x - mean) * torch.exp(-log_scale)
        return 0.5 * (z * z).sum() + 6 * log_scale.sum()

    return f, (r(3), r(3))


@zoo.case("two variables, fractional power")
def _(r):
    return lambda v: v[0] ** 0.7 + v[1] ** 2, torch.tensor([6.0, -2.0]).to(r(1))


@zoo.parametrize()
def test_energies(case, mode):
    case.check(mode)
