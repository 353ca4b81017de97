"""Differential equations and control: steps of solvers, their batches and their residuals."""

import torch
from support.zoo import Zoo

zoo = Zoo()


def lorenz96(x):
    return (x.roll(-1, -1) - x.roll(2, -1)) * x.roll(1, -1) - x + 8.0


def rk4(f, x, h=0.05):
    k1 = f(x)
    k2 = f(x + h / 2 * k1)
    k3 = f(x + h / 2 * k2)
    k4 = f(x + h * k3)
    return x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)


def cartpole(s):
    th, xd, thd, u = s[..., 1], s[..., 2], s[..., 3], s[..., 4]
    g, mc, mp, length = 9.81, 1.0, 0.1, 0.5
    sth, cth = torch.sin(th), torch.cos(th)
    tmp = (u + mp * length * thd * thd * sth) / (mc + mp)
    thdd = (g * sth - cth * tmp) / (length * (4 / 3 - mp * cth * cth / (mc + mp)))
    return torch.stack([xd, thd, tmp - mp * length * thdd * cth / (mc + mp), thdd], -1)


def cart_step(s, a):
    x, v, th, w = s.unbind(-1)
    c, sn = th.cos(), th.sin()
    t = (a + 0.05 * w * w * sn) / 1.1
    al = (9.8 * sn - c * t) / (0.5 * (4 / 3 - 0.1 * c * c / 1.1))
    ac = t - 0.05 * al * c / 1.1
    return torch.stack([x + 0.02 * v, v + 0.02 * ac, th + 0.02 * w, w + 0.02 * al], -1)


def double_pendulum(s):
    a, b, wa, wb = s.unbind(-1)
    d = a - b
    den = 2 - torch.cos(d) ** 2
    da = (-9.8 * (2 * torch.sin(a) - torch.sin(b) * torch.cos(d)) - torch.sin(d) * (wb * wb + wa * wa * torch.cos(d))) / den
    db = (
        2 * torch.sin(d) * wa * wa + 19.6 * (torch.sin(a) * torch.cos(d) - torch.sin(b)) + wb * wb * torch.sin(d) * torch.cos(d)
    ) / den
    return torch.stack([wa, wb, da, db], -1)


@zoo.case("Lorenz-96")
def _(r):
    return lorenz96, r(9)


@zoo.case("Lorenz-96, one RK4 step")
def _(r):
    return lambda x: rk4(lorenz96, x), r(18)


@zoo.case("Lorenz-96, a batch")
def _(r):
    return lorenz96, r(3, 7)


@zoo.case("cart-pole")
def _(r):
    return cartpole, r(4, 5)


@zoo.case("one cart-pole")
def _(r):
    return cartpole, r(5)


@zoo.case("three cart steps in state and action")
def _(r):
    return lambda s, a: cart_step(cart_step(cart_step(s, a), a), a), (r(4, 4), r(4))


@zoo.case("cart cost")
def _(r):
    return lambda s, a: (cart_step(cart_step(s, a), a) ** 2).sum(), (r(3, 4), r(3))


@zoo.case("pendulum, two RK4 steps")
def _(r):
    return lambda s: rk4(double_pendulum, rk4(double_pendulum, s)), r(3, 4)


@zoo.case("implicit midpoint by fixed point")
def _(r):
    def f(x):
        y = x
        for _ in range(3):
            y = x + 0.05 * lorenz96((x + y) / 2)
        return y

    return f, r(8)


@zoo.case("Euler-Maruyama with fixed noise")
def _(r):
    noise = r(5, 3, 2)

    def f(x, sigma):
        for dw in noise:
            x = x - 0.1 * x**3 + sigma * x * dw * 0.3
        return x

    return f, (r(3, 2), r(2))


@zoo.case("heat equation, upwind and periodic")
def _(r):
    def f(u):
        for _ in range(2):
            u = u + 0.1 * (u.roll(1, 0) - 2 * u + u.roll(-1, 0)) - 0.2 * u * (u - u.roll(1, 1))
        return u

    return f, r(4, 5)


@zoo.case("natural cubic spline value")
def _(r):
    knots = torch.linspace(0, 1, 5).to(r(1))
    at = torch.tensor([0.05, 0.3, 0.55, 0.99]).to(r(1))
    k = torch.searchsorted(knots, at) - 1

    def f(y):
        h = knots[1] - knots[0]
        a = torch.diag(torch.full((3,), 4.0).to(y)) + torch.diag(torch.ones(2).to(y), 1) + torch.diag(torch.ones(2).to(y), -1)
        m = torch.linalg.solve(a, 6 * (y[2:] - 2 * y[1:-1] + y[:-2]) / h**2)
        m = torch.nn.functional.pad(m, (1, 1))
        t = (at - knots[k]) / h
        linear = (1 - t) * y[k] + t * y[k + 1]
        return linear + h**2 / 6 * (((1 - t) ** 3 - (1 - t)) * m[k] + (t**3 - t) * m[k + 1])

    return f, r(5)


@zoo.case("monotone rational quadratic spline")
def _(r):
    x = torch.linspace(0.05, 0.95, 6).to(r(1))

    def f(widths, heights, slopes):
        w, h, d = widths.softmax(0), heights.softmax(0), torch.nn.functional.softplus(slopes)
        cw = torch.nn.functional.pad(w.cumsum(0), (1, 0))
        ch = torch.nn.functional.pad(h.cumsum(0), (1, 0))
        k = (torch.searchsorted(cw.detach(), x) - 1).clamp(0, 3)
        t = (x - cw[k]) / w[k]
        s = h[k] / w[k]
        top = h[k] * (s * t**2 + d[k] * t * (1 - t))
        return ch[k] + top / (s + (d[k + 1] + d[k] - 2 * s) * t * (1 - t))

    return f, (r(4), r(4), r(5))


def field(w1, w2):
    return lambda p: torch.tanh(p @ w1) @ w2


@zoo.case("residual of a physics-informed net", skip=("func", "forward", "value"))
def _(r):
    net = field(r(2, 6), r(6, 1))

    def f(p):
        if not p.requires_grad:
            p = p.detach().requires_grad_()
        with torch.enable_grad():
            u = net(p)
            du = torch.autograd.grad(u.sum(), p, create_graph=True)[0]
            ux, ut = du[:, 0], du[:, 1]
            uxx = torch.autograd.grad(ux.sum(), p, create_graph=True)[0][:, 0]
            return ut + u[:, 0] * ux - 0.1 * uxx

    return f, r(4, 2)


@zoo.parametrize()
def test_dynamics(case, mode):
    case.check(mode)
