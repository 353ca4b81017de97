"""Jacobians whose structure (diagonal, batch, band, window, gather) must survive, and must be right where it does not."""

import torch
from support.zoo import Zoo

zoo = Zoo()


@zoo.case("pointwise")
def _(r):
    return lambda x: (x.sin() * x.exp() + x**2).tanh(), r(20)


@zoo.case("broadcast row times matrix")
def _(r):
    return lambda x, w: x * w, (r(5, 2), r(2))


@zoo.case("expand then multiply")
def _(r):
    q = r(5, 2)
    return lambda w: (w.expand(5, 2) * q).sin(), r(2)


@zoo.case("affine in its parameters")
def _(r):
    t = torch.linspace(0, 1, 20).to(r(1))
    return lambda a, b: a * t + b, (r(1), r(1))


@zoo.case("softmax")
def _(r):
    return lambda x: x.softmax(1), r(4, 5)


@zoo.case("cross entropy per sample by gather")
def _(r):
    target = torch.arange(6, device=r(1).device) % 5
    return lambda x: -(x.log_softmax(1).gather(1, target[:, None])), r(6, 5)


@zoo.case("cross entropy of an MLP by logsumexp")
def _(r):
    w1, w2 = r(4, 5), r(5, 5)
    rows, target = torch.arange(6), torch.arange(6) % 5

    def f(x):
        z = (x @ w1).tanh() @ w2
        return z.logsumexp(1) - z[rows, target]

    return f, r(6, 4)


def spring_forces(x, a, b):
    d = x[a] - x[b]
    s = (d * d).sum(1, keepdim=True) + 0.1
    return d * (s.sqrt() - 1) / s.sqrt()


@zoo.case("spring edge forces")
def _(r):
    a, b = r.integers(0, 6, 9), r.integers(0, 6, 9)
    return lambda x: spring_forces(x, a, b), r(6, 3)


@zoo.case("spring node forces by index_add")
def _(r):
    a, b, z = r.integers(0, 6, 9), r.integers(0, 6, 9), r.zeros(6, 3)
    return lambda x: z.index_add(0, a, spring_forces(x, a, b)), r(6, 3)


@zoo.case("head split")
def _(r):
    return lambda x: x.reshape(2, 3, 2, 3).transpose(1, 2).reshape(4, 3, 3).sin(), r(2, 3, 6)


@zoo.case("heads times constant keys")
def _(r):
    k = r(4, 3, 5)
    return lambda x: torch.bmm(x.reshape(2, 2, 2, 3).transpose(1, 2).reshape(4, 2, 3), k), r(2, 2, 6)


def scores(x, wq, wk):
    b, t, h, d = x.shape[0], x.shape[1], 2, x.shape[2] // 2
    q = (x @ wq).reshape(b, t, h, d).transpose(1, 2)
    k = (x @ wk).reshape(b, t, h, d).transpose(1, 2)
    return torch.bmm(q.reshape(b * h, t, d), k.transpose(2, 3).reshape(b * h, d, t))


@zoo.case("attention scores")
def _(r):
    wq, wk = r(4, 4), r(4, 4)
    return lambda x: scores(x, wq, wk), r(2, 3, 4)


@zoo.case("attention probabilities")
def _(r):
    wq, wk = r(4, 4), r(4, 4)
    return lambda x: scores(x, wq, wk).softmax(-1), r(2, 3, 4)


def hand_layer_norm(x):
    m = x.mean(-1, keepdim=True)
    v = ((x - m) ** 2).mean(-1, keepdim=True)
    return (x - m) / (v + 1e-5).sqrt()


@zoo.case("layer norm by hand")
def _(r):
    return hand_layer_norm, r(3, 5)


@zoo.case("layer norm")
def _(r):
    return lambda x: torch.nn.functional.layer_norm(x.sin(), (5,)), r(3, 5)


@zoo.case("batch statistics by hand")
def _(r):
    return lambda x: (x - x.mean(0)) / (x.var(0) + 1), r(5, 3)


@zoo.case("convolution as unfold and product")
def _(r):
    k = r(3, 4)
    return lambda x: (x.unfold(1, 3, 1) @ k).tanh(), r(2, 8)


@zoo.case("two strided convolutions")
def _(r):
    k = r(3, 4)
    return lambda x: (x.unfold(1, 3, 1) @ k[:, :1]).squeeze(-1).tanh().unfold(1, 3, 2) @ k, r(2, 9)


@zoo.case("padded convolution by cat")
def _(r):
    k, z = r(3, 4), r.zeros(2, 1)
    return lambda x: torch.cat([z, x, z], 1).unfold(1, 3, 1) @ k, r(2, 6)


@zoo.case("two convolutions with one nest")
def _(r):
    k = r(3, 4)

    def f(x):
        return (x.unfold(1, 3, 1) @ k[:, 0]).sin() + (x.unfold(1, 3, 1) @ k[:, 1]).cos() + x[:, 1:-1]

    return f, r(3, 7)


@zoo.case("cumsum as a product")
def _(r):
    tri = torch.ones(5, 5).to(r(1)).tril()
    return lambda x: x.sin() @ tri.t(), r(3, 5)


@zoo.case("cumsum")
def _(r):
    return lambda x: x.sin().cumsum(1), r(3, 5)


@zoo.case("flat slice back to two axes")
def _(r):
    return lambda x: x.reshape(-1)[1:-2].reshape(3, 3).sin(), r(3, 4)


@zoo.case("reshape with carries")
def _(r):
    w = r(6, 4)
    return lambda x: (x.reshape(4, 6).sin() @ w).reshape(2, 8), r(8, 3)


@zoo.case("transpose then reshape")
def _(r):
    return lambda x: x.t().reshape(4, 6).exp(), r(8, 3)


@zoo.case("gather then reshape")
def _(r):
    a = r.integers(0, 6, 8)
    return lambda x: x[a].reshape(2, 4, 3).transpose(0, 2).sin(), r(6, 3)


@zoo.case("gather, cat, gather")
def _(r):
    a, b = r.integers(0, 6, 8), r.integers(0, 14, 9)
    return lambda x: torch.cat([x, x[a]], 0)[b].sin(), r(6, 2)


@zoo.case("gather of a gather")
def _(r):
    a, b = r.integers(0, 6, 8), r.integers(0, 8, 8)
    return lambda x: x[a][b].sin() + x[a[b]], r(6, 2)


@zoo.case("index_put")
def _(r):
    z, at = r.zeros(9), torch.arange(0, 7)
    return lambda x: z.index_put((at,), x.sin()), r(7)


@zoo.case("flip, diagonal, step")
def _(r):
    return lambda x: x.flip(0).diagonal().exp()[::2], r(5, 5)


@zoo.case("outer product of one input")
def _(r):
    return lambda x: (x[:, None] * x[None]).sin(), r(6)


@zoo.case("batched outer product")
def _(r):
    return lambda x: x[:, :, None] * x[:, None, :], r(3, 4)


@zoo.case("x times its transpose")
def _(r):
    return lambda x: (x @ x.t()).tanh(), r(4, 3)


@zoo.case("diagonal of a square")
def _(r):
    return lambda a: (a @ a).diagonal(), r(4, 4)


@zoo.case("sum of tied differences")
def _(r):
    return lambda x: (x[:, None] - x[None]).pow(2).sum(1), r(6)


@zoo.case("pairwise distances")
def _(r):
    return lambda x: ((x[:, None] - x[None]).pow(2).sum(-1) + 1).sqrt(), r(4, 3)


def shift_chain(x, n):
    for _ in range(n):
        x = x * x.roll(1, 0) * 0.5 + x.sin()
    return x


for _n in (1, 2, 4):

    @zoo.case(f"chain of {_n} shifts")
    def _(r, n=_n):
        return lambda x: shift_chain(x, n), r(12)


def heat(u):
    i = u[1:-1, 1:-1]
    return i + 0.1 * (u[2:, 1:-1] + u[:-2, 1:-1] + u[1:-1, 2:] + u[1:-1, :-2] - 4 * i)


def heat_with_borders(u):
    top = torch.cat([u[:1, 1:-1], heat(u), u[-1:, 1:-1]], 0)
    return torch.cat([u[:, :1], top, u[:, -1:]], 1)


@zoo.case("heat stencil")
def _(r):
    return heat, r(5, 6)


@zoo.case("three heat stencils")
def _(r):
    return lambda u: heat(heat(heat(u)) ** 2), r(8, 7)


@zoo.case("two heat steps with borders")
def _(r):
    return lambda u: heat_with_borders(heat_with_borders(u) ** 2), r(5, 6)


@zoo.case("cat with constants, sliced")
def _(r):
    z = r.zeros(2, 3)
    return lambda x: torch.cat([z, x, z[:1], x.sin()], 0)[1:9], r(4, 3)


@zoo.case("stack of rows")
def _(r):
    return lambda x: torch.stack([x[i] * x[(i + 1) % 5] for i in range(5)]), r(5, 3)


@zoo.case("loop over rows")
def _(r):
    return lambda x: torch.stack([(x[i] * i).sin() for i in range(8)]), r(8, 3)


@zoo.case("pooling as a view")
def _(r):
    return lambda x: x.reshape(3, 2, 4).sum(1).exp(), r(6, 4)


@zoo.case("bilinear form per sample")
def _(r):
    w = r(4, 4)
    return lambda x: ((x @ w) * x).sum(-1), r(5, 4)


@zoo.case("index_add after gather")
def _(r):
    a, b, z = r.integers(0, 6, 9), r.integers(0, 6, 9), r.zeros(6, 3)
    return lambda x: z.index_add(0, b, x[a].sin() * 2).tanh(), r(6, 3)


@zoo.case("slice of index_add")
def _(r):
    a, b, z = r.integers(0, 10, 9), r.integers(0, 10, 9), r.zeros(10)
    return lambda x: z.index_add(0, b, x[a])[2:9:2].exp(), r(10)


@zoo.case("two message passing layers")
def _(r):
    a, b, z = r.integers(0, 5, 8), r.integers(0, 5, 8), r.zeros(5, 3)

    def layer(x):
        return z.index_add(0, b, (x[a] - x[b]).tanh()) + x

    return lambda x: layer(layer(x)), r(5, 3)


@zoo.case("ring of neighbours")
def _(r):
    z, at = r.zeros(12, 2), torch.arange(12)
    return lambda x: z.index_add(0, at, (x[(at * 7) % 12] - x).tanh()), r(12, 2)


@zoo.case("roll over both axes")
def _(r):
    return lambda x: x.roll((1, -2), (0, 1)) * x.roll(3), r(4, 5)


@zoo.case("triangles and pads")
def _(r):
    return lambda x: torch.nn.functional.pad(x.tril() @ x.triu(), (1, 2, 0, 1)).square(), r(4, 4)


@zoo.case("split, chunk and cat back")
def _(r):
    def f(x):
        a, b, c = x.split([1, 2, 3], 1)
        d, e = x.chunk(2, 1)
        return torch.cat([a * b, c.sin(), d * e], 1)

    return f, r(3, 6)


@zoo.case("scatter")
def _(r):
    at, z = torch.tensor([[0, 2, 4], [5, 1, 3]]), r.zeros(2, 6)
    return lambda x: z.scatter(1, at, x.sin()) * z.scatter_add(1, at % 3, x * x).sum(1, keepdim=True), r(2, 3)


@zoo.case("index_select, take_along_dim, masked_fill")
def _(r):
    at, order = torch.tensor([2, 0, 2]), torch.tensor([[1, 0], [0, 0], [1, 1], [0, 1]])
    mask = torch.tensor([[True, False], [False, False], [False, True]])

    def f(x):
        return x.take_along_dim(order, 1).index_select(0, at).masked_fill(mask, 2.0) * x[:3]

    return f, r(4, 2)


@zoo.case("masked_select")
def _(r):
    mask = torch.tensor([[True, False, True], [False, True, True]])
    return lambda x: x.masked_select(mask).square() * x.sum(), r(2, 3)


@zoo.case("sort and topk")
def _(r):
    return lambda x: x.sort(1).values.cumsum(1) + x.topk(2, 1).values.sum(1, keepdim=True), r(3, 4)


@zoo.case("reductions")
def _(r):
    def f(x):
        return torch.stack([x.prod(1), x.var(1), x.std(1), x.norm(dim=1), x.amax(1), x.amin(1), x.max(1).values], 1)

    return f, r(4, 3)


@zoo.case("einsum and tensordot")
def _(r):
    w, v = r(4, 2, 3), r(3, 4)

    def f(x, y):
        return torch.einsum("bij,jk,bkl->bil", x, y, x.transpose(1, 2)) + torch.tensordot(w, v, dims=([2], [0]))[:3, :, :2].sum()

    return f, (r(2, 2, 3), r(3, 3))


@zoo.case("clamp, where, maximum away from ties")
def _(r):
    y = r(3, 4)
    return lambda x: torch.where(x > y, x.square(), y * x) + x.clamp(-0.5, 0.8) + torch.maximum(x, y), r(3, 4)


@zoo.case("kinks and ties")
def _(r):
    y = torch.tensor([0.0, 1.0, -1.0, 2.0]).to(r(1))
    x = torch.tensor([0.0, 1.0, -1.0, 0.5]).to(r(1))

    def f(x):
        smooth = x.abs() + x.relu() + x.clamp(-1, 1) + torch.maximum(x, y) + torch.minimum(x, y)
        return smooth + x.sign() * 3 + torch.nn.functional.hardtanh(x) + x.amax() + x.norm()

    return f, x


@zoo.parametrize()
def test_structure(case, mode):
    case.check(mode)
