"""Linear algebra and Fourier transforms: local operators whose batch axes stay tied."""

import pytest
import torch
import wengert
from support.check import DEVICE
from support.compare import Tolerance, assert_same
from support.native import Calls
from support.zoo import Zoo
from torch.autograd import functional as F

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


@zoo.case("sign and logarithm of the determinant")
def _(r):
    return lambda a: tuple(torch.linalg.slogdet(spd(a))), r(3, 3)


@zoo.case("determinants where singular values are equal", skip=("history",))  # torch's vectorised ones lead to nan
def _(r):
    def at(value, a):
        return value + (a - a.detach())

    def f(a):
        return torch.stack([torch.linalg.det(at(torch.eye(3).to(a), a)), torch.linalg.slogdet(at(2 * torch.eye(3).to(a), a))[1]])

    return f, r(3, 3)


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


@zoo.case("logcumsumexp", skip=("create_graph", "history"))  # torch's third derivative is nan
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


@zoo.case("convolution by spectra")
def _(r):
    k = r(6)
    return lambda x: torch.fft.irfft(torch.fft.rfft(x) * torch.fft.rfft(k) * torch.fft.rfft(x), n=6), r(2, 6)


@zoo.case("2-d power spectrum")
def _(r):
    return lambda x: torch.fft.fft2(x).abs().log1p().sum(-1), r(3, 4)


@zoo.case("shifted and sliced spectrum")
def _(r):
    return lambda x: (torch.fft.fftshift(torch.fft.fft(x, norm="ortho"))[..., 1:4].conj() / (2 + 1j)).imag, r(2, 5)


@zoo.case("complex arithmetic")
def _(r):
    def f(x, y):
        z = torch.polar(x.exp(), y) + torch.complex(x, y.sin()).reshape(-1, 1)
        return (z.exp() / (z * z.conj() + 3)).angle() + torch.view_as_real(z.tanh()).prod(-1) + z.pow(2).sum().abs()

    return f, (r(3), r(3))


@zoo.case("eigenvalues in the plane")
def _(r):
    return lambda a: torch.linalg.eigvals(a + torch.diag(torch.arange(3).to(a) * 9)).real.sort().values, r(3, 3)


@zoo.case("a product through flipped partial products")
def _(r):
    return lambda x: x.prod() * torch.prod(x * 0, 1).sum() + x.flip(0).cumprod(0).flip(0) @ x, r(4, 4)


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


SPECTRA = {
    "power": lambda x: torch.fft.rfft(x).abs() ** 2,
    "derivative": lambda x: torch.fft.irfft(torch.fft.rfft(x) * torch.arange(4) * 1j, n=6) * x,
    "polar": lambda x: torch.polar(x.exp(), x).real,
}


@pytest.mark.parametrize("name", SPECTRA)
def test_samples_stay_apart_through_spectra(name):
    x = torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator(DEVICE).manual_seed(0))
    before = Calls.now()
    ours = wengert.batch_jacobian(SPECTRA[name], x)
    assert (Calls.now() - before).native == 1
    assert_same(ours, torch.func.vmap(torch.func.jacrev(SPECTRA[name]))(x))


def test_cotangents_that_cancel_do_so_before_ill_conditioned_nodes():
    """Each subspace iteration multiplies what is not cancelled by the squared ratio of the singular values."""
    g = torch.Generator(DEVICE).manual_seed(0)
    q = torch.linalg.qr(torch.randn(3, 2, dtype=torch.float64, generator=g)).Q
    a = (q * torch.tensor([90.0, 1.3])) @ torch.randn(2, 3, dtype=torch.float64, generator=g)

    def basis(a):
        y = torch.eye(3, 2, dtype=a.dtype)
        for _ in range(2):
            y = torch.linalg.qr(a.mT @ torch.linalg.qr(a @ y).Q).Q
        return (y * torch.arange(6).reshape(3, 2)).sum()

    assert_same(wengert.hessian(basis, a), F.hessian(basis, a), tol=Tolerance(rtol=1e-9, atol=1e-11))
