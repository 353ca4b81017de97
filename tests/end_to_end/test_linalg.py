"""Linear algebra and Fourier transforms: local operators whose batch axes stay tied."""

import torch
from support.zoo import Zoo

zoo = Zoo()


def spd(a):
    return a @ a.transpose(-2, -1) + 2 * torch.eye(a.shape[-1]).to(a)


@zoo.case("batched cholesky")
def _(r):
    return lambda a: torch.linalg.cholesky(spd(a)), r(2, 3, 3)


@zoo.case("batched solve")
def _(r):
    return lambda a, b: torch.linalg.solve(spd(a), b), (r(2, 3, 3), r(2, 3, 2))


@zoo.case("batched inverse")
def _(r):
    return lambda a: torch.linalg.inv(spd(a)), r(2, 3, 3)


@zoo.case("det and slogdet")
def _(r):
    return lambda a: torch.linalg.det(a) + torch.linalg.slogdet(spd(a)).logabsdet, r(3, 3, 3)


@zoo.case("triangular solve")
def _(r):
    return lambda a, b: torch.linalg.solve_triangular(spd(a), b, upper=False), (r(2, 3, 3), r(2, 3, 2))


@zoo.case("cholesky solve")
def _(r):
    return lambda a, b: torch.cholesky_solve(b, torch.linalg.cholesky(spd(a))), (r(3, 3), r(3, 2))


@zoo.case("eigenvalues of a symmetric batch")
def _(r):
    return lambda a: torch.linalg.eigvalsh(a + a.transpose(-2, -1)), r(2, 3, 3)


@zoo.case("projectors from eigenvectors")
def _(r):
    def f(a):
        v = torch.linalg.eigh(a + a.transpose(-2, -1)).eigenvectors
        return v[..., :1] @ v[..., :1].transpose(-2, -1)

    return f, r(2, 3, 3)


@zoo.case("singular values")
def _(r):
    return lambda a: torch.linalg.svdvals(a), r(2, 3, 2)


@zoo.case("qr")
def _(r):
    return lambda a: torch.linalg.qr(a), r(2, 3, 2)


@zoo.case("matrix exponential")
def _(r):
    return lambda a: torch.matrix_exp(a * 0.3), r(2, 2, 2)


@zoo.case("Gaussian process marginal likelihood")
def _(r):
    x, y = r(5, 2), r(5)

    def f(log_length, log_noise):
        d = ((x[:, None] - x[None]) * torch.exp(-log_length)).square().sum(-1)
        k = torch.exp(-0.5 * d) + torch.exp(log_noise) * torch.eye(5).to(y)
        c = torch.linalg.cholesky(k)
        a = torch.cholesky_solve(y[:, None], c)[:, 0]
        return 0.5 * y @ a + c.diagonal().log().sum()

    return f, (r(2), r(1)[0])


@zoo.case("norms")
def _(r):
    return lambda x: torch.stack([x.norm(), x.norm(1), torch.linalg.vector_norm(x, 3), torch.linalg.matrix_norm(x)]), r(3, 2)


@zoo.case("cdist", skip=("forward",))
def _(r):
    return lambda x, y: torch.cdist(x, y).square(), (r(3, 2), r(4, 2))


@zoo.case("kron, cross, trace, outer")
def _(r):
    def f(a, b):
        return (
            torch.kron(a, b[:2, :2]).flatten()[:9] * torch.linalg.cross(a[:, :3], b).flatten()
            + a.trace() * torch.outer(a[0], b[1]).sum()
        )

    return f, (r(3, 3), r(3, 3))


@zoo.case("cumprod and cummax")
def _(r):
    return lambda x: x.cumprod(1) + x.cummax(1).values, r(3, 4)


@zoo.case("logcumsumexp", skip=("create_graph",))  # torch's third derivative is nan
def _(r):
    return lambda x: x.logcumsumexp(0) * x, r(3, 4)


@zoo.case("real Fourier transform there and back")
def _(r):
    w = r(5)
    return lambda x: torch.fft.irfft(torch.fft.rfft(x) * w, n=8), r(2, 8)


@zoo.case("power spectrum")
def _(r):
    return lambda x: torch.view_as_real(torch.fft.fft(x, dim=-1)).square().sum(-1), r(2, 6)


@zoo.case("circular convolution in two dimensions")
def _(r):
    k = torch.fft.rfft2(r(3, 4))
    return lambda x: torch.fft.irfft2(torch.fft.rfft2(x) * k, s=(3, 4)).tanh(), r(2, 3, 4)


@zoo.case("spectral derivative")
def _(r):
    k = torch.fft.rfftfreq(8, 1 / 8).to(r(1)) * 1j

    def f(u):
        return u * torch.fft.irfft(k * torch.fft.rfft(u), n=8)

    return f, r(8)


@zoo.case("stft-like framing")
def _(r):
    win = torch.hann_window(4).to(r(1))
    return lambda x: torch.fft.rfft(x.unfold(-1, 4, 2) * win).abs().square(), r(2, 8)


@zoo.case("Kalman filter step")
def _(r):
    f_, h, q, z = r(2, 2), r(1, 2), torch.eye(2).to(r(1)) * 0.1, r(1)

    def f(m, p):
        m, p = f_ @ m, f_ @ spd(p) @ f_.t() + q
        s = h @ p @ h.t() + 0.5
        k = torch.linalg.solve(s, h @ p).t()
        return m + k @ (z - h @ m), p - k @ h @ p

    return f, (r(2), r(2, 2))


@zoo.parametrize()
def test_linalg(case, mode):
    case.check(mode)
