"""Products of matrices, linear algebra, spectra."""

import torch
import torch.nn.functional as nnf
from draw import FLOAT, op


@op
def gram(x, d):
    x = d.matrix(x)
    return x @ x.transpose(-1, -2) if d.chance(0.5) else x.transpose(-1, -2) @ x


@op
def times_constant(x, d):
    m = x.shape[-1]
    return x @ (d.tensor(m) if d.chance(0.3) else d.tensor(m, 2))


@op
def linear(x, d):
    m = x.shape[-1]
    return nnf.linear(x, d.tensor(2, m), d.tensor(2))


@op(batched=False)
def products_of_one_value(x, d):
    x = d.matrix(x)
    m = x.shape[-1]
    v = x.reshape(-1)
    return d.choice(
        [
            lambda: torch.addmm(x[:1, :1], x, d.tensor(m, 2), beta=d.value([0.5, 1, 2]), alpha=d.value([1, -2])),
            lambda: torch.bmm(x.unsqueeze(0).expand(2, -1, m), d.tensor(1, m, 2).expand(2, m, 2)),
            lambda: x @ torch.as_strided(v.contiguous(), (m, 1), (0, 1)),
            lambda: torch.baddbmm(x.unsqueeze(0), x.unsqueeze(0)[:, :, :1], x.unsqueeze(0)[:, :1], beta=0.5),
            lambda: torch.outer(v[:3], v[-3:]) + torch.dot(v, v.flip(0)),
            lambda: torch.addmv(x[:, 0], x, x[0]),
            lambda: torch.addr(d.tensor(3, 3), d.cycled(x, 3), d.cycled(x, 3).sin()),
            lambda: torch.linalg.multi_dot([x, x.t(), x]),
        ]
    )()


@op
def einsum(x, d):
    x = d.matrix(x)
    k = min(x.shape[-2:])
    q = x[..., :k, :k]
    return d.choice(
        [
            lambda: torch.einsum("...ij,...ik->...jk", x, x),
            lambda: torch.einsum("...ii->...i", q),
            lambda: torch.einsum("...ij,...jk,...ki->...ik", q, q, q),
            lambda: torch.einsum("...i,...j->...ij", d.flat(x)[..., :3], d.flat(x)[..., -3:]),
            lambda: torch.einsum("...ij,kj->...ik", x, d.tensor(2, x.shape[-1])),
            lambda: torch.einsum("...ij,...ij->...j", x, x.flip(-1)),
            lambda: torch.einsum("...bi,...bj,...bk->...bi", x, x, x),
            lambda: torch.einsum("...ij,...j->...i", x, x[..., 0, :]),
        ]
    )()


@op
def bilinear_form(x, d):
    v = d.cycled(x, 3)
    return ((v @ d.tensor(3, 3)) * v).sum(-1, keepdim=True) * v


@op
def triple_product(x, d):
    a = d.square(x, 2)
    return a @ a.transpose(-1, -2) @ a


@op
def solve(x, d):
    k = d.integer(2, 3)
    return torch.linalg.solve(d.square(x, k) + 5 * torch.eye(k, dtype=FLOAT), d.cycled(x, k).unsqueeze(-1))


@op
def positive_definite(x, d):
    k = d.integer(2, 3)
    a = d.square(x, k)
    s = a @ a.transpose(-1, -2) + 2 * torch.eye(k, dtype=FLOAT)
    return d.choice(
        [
            lambda: torch.linalg.cholesky(s),
            lambda: torch.linalg.eigvalsh(s + torch.diag(3 * torch.arange(k, dtype=FLOAT))),
            lambda: torch.linalg.slogdet(s)[1].unsqueeze(-1),
            lambda: torch.cholesky_solve(d.cycled(x, k).unsqueeze(-1), torch.linalg.cholesky(s)),
            lambda: torch.logdet(s).unsqueeze(-1),
            lambda: torch.linalg.inv(s),
        ]
    )()


@op
def square_matrix(x, d):
    k = d.integer(2, 3)
    a = d.square(x, k)
    eye = torch.eye(k, dtype=FLOAT)
    return d.choice(
        [
            lambda: torch.linalg.inv(a + 5 * eye),
            lambda: torch.linalg.det(a + 5 * eye).unsqueeze(-1) * d.cycled(x, 2),
            lambda: torch.linalg.matrix_exp(a * 0.3),
            lambda: torch.linalg.solve_triangular(a.tril() + 5 * eye, a, upper=False),
            lambda: torch.linalg.matrix_power(a, d.integer(0, 3)),
            lambda: a.diagonal(0, -2, -1).sum(-1, keepdim=True) * d.cycled(x, 2),
        ]
    )()


@op
def cross_product(x, d):
    return torch.linalg.cross(d.cycled(x, 3), d.flat(x)[..., -3:] if d.size(x) > 2 else d.cycled(x, 3).sin())


@op
def spectrum(x, d):
    axis = d.axis(x)
    n = x.shape[axis]
    return d.choice(
        [
            lambda: torch.fft.rfft(x, dim=axis).real,
            lambda: (torch.fft.fft(x, dim=axis) + 3).abs().pow(2),
            lambda: torch.fft.irfft(torch.fft.rfft(x, dim=axis) * torch.fft.rfft(x, dim=axis).conj(), n=n, dim=axis),
            lambda: torch.fft.ifft(x * (1 + 2j), dim=axis).real,
            lambda: torch.fft.fftshift(x, axis),
        ]
    )()


@op
def complex_within(x, d):
    z = torch.complex(x, x.flip(-1))
    return d.choice(
        [
            lambda: (z * z).imag,
            lambda: torch.view_as_real(torch.exp(0.3 * z)).sum(-1),
            lambda: torch.polar(x.abs() + 0.1, x).real,
            lambda: (z * z.conj()).real,
        ]
    )()


@op(batched=False)
def tensordot(x, d):
    x = d.matrix(x)
    return torch.tensordot(x, x, dims=([0], [0]))


@op
def two_layer_net(x, d):
    y = d.flat(x)
    return torch.tanh(y @ d.tensor(y.shape[-1], 3)) @ d.tensor(3, 2)
