"""Ordinary networks and programs, each spelled out once as its users write it.

Every one maps a batch (B, *in) to a batch (B, *out) whose samples do not meet, with parameters that can be replaced, and has a
loss of an output and a target. `run_networks.py` asks for their derivatives in every form; the tests count what that costs.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

Parameters = dict[str, Tensor]
Loss = Callable[[Tensor, Tensor], Tensor]


@dataclasses.dataclass
class Network:
    """`call(parameters, x)` with any parameters; `forward(x)` with its own, which are leaves that require gradients."""

    parameters: Parameters
    call: Callable[[Parameters, Tensor], Tensor]
    forward: Callable[[Tensor], Tensor]
    loss: Loss
    x: Tensor
    target: Tensor


Build = Callable[[int], Network]
NETWORKS: dict[str, Build] = {}


def network(build: Build) -> Build:
    NETWORKS[build.__name__.strip("_")] = build
    return build


def make(name: str, batch: int, device: torch.device | str = "cpu") -> Network:
    """Seeded, so that two builds of a name, batch and device are equal."""
    device = torch.device(device)
    with torch.random.fork_rng(devices=["cuda"] if device.type == "cuda" else []), device:
        torch.manual_seed(0)
        return NETWORKS[name](batch)


def of_module(module: nn.Module, x: Tensor, loss: Loss = F.mse_loss, target: Tensor | None = None) -> Network:
    module.eval()
    own = dict(module.named_parameters())
    target = torch.randn_like(module(x).detach()) if target is None else target
    return Network(own, lambda p, z: functional_call(module, p, (z,)), module, loss, x, target)


def of_function(
    parameters: Parameters, call: Callable[[Parameters, Tensor], Tensor], x: Tensor, loss: Loss = F.mse_loss
) -> Network:
    own = {name: p.requires_grad_() for name, p in parameters.items()}
    target = torch.randn_like(call(own, x).detach())
    return Network(own, call, lambda z: call(own, z), loss, x, target)


def classes(batch: int, count: int) -> Tensor:
    return torch.arange(batch) % count


# ---- dense networks --------------------------------------------------------------------------------------------------------


@network
def _mlp_layer_norm(batch):
    net = nn.Sequential(
        nn.Linear(12, 48), nn.LayerNorm(48), nn.Tanh(), nn.Linear(48, 48), nn.LayerNorm(48), nn.Tanh(), nn.Linear(48, 6)
    )
    return of_module(net, torch.randn(batch, 12))


@network
def _mlp_batch_norm(batch):
    net = nn.Sequential(
        nn.Linear(12, 48), nn.BatchNorm1d(48), nn.ReLU(), nn.Linear(48, 48), nn.BatchNorm1d(48), nn.ReLU(), nn.Linear(48, 6)
    )
    net(torch.randn(64, 12))  # statistics other than 0 and 1
    return of_module(net, torch.randn(batch, 12), F.cross_entropy, classes(batch, 6))


@network
def _mlp_group_norm(batch):
    net = nn.Sequential(
        nn.Linear(12, 48), nn.GroupNorm(4, 48), nn.GELU(), nn.Linear(48, 48), nn.GroupNorm(4, 48), nn.GELU(), nn.Linear(48, 6)
    )
    return of_module(net, torch.randn(batch, 12))


@network
def _mlp_rms_norm(batch):
    net = nn.Sequential(
        nn.Linear(12, 48), nn.RMSNorm(48), nn.SiLU(), nn.Linear(48, 48), nn.RMSNorm(48), nn.SiLU(), nn.Linear(48, 6)
    )
    return of_module(net, torch.randn(batch, 12), F.smooth_l1_loss)


@network
def _mlp_softplus(batch):
    net = nn.Sequential(
        nn.Linear(2, 64), nn.Softplus(), nn.Linear(64, 64), nn.Softplus(), nn.Linear(64, 64), nn.Softplus(), nn.Linear(64, 1)
    )
    return of_module(net, torch.randn(batch, 2))


@network
def _wide_output(batch):
    net = nn.Sequential(nn.Linear(1, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 400))
    return of_module(net, torch.randn(batch, 1))


class Residual(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


class Over(nn.Module):
    """A module with the last two axes exchanged."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.transpose(-1, -2)).transpose(-1, -2)


@network
def _mixer(batch):
    def block():
        tokens = nn.Sequential(nn.LayerNorm(16), Over(nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))))
        channels = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))
        return nn.Sequential(Residual(tokens), Residual(channels))

    net = nn.Sequential(block(), block(), nn.Flatten(), nn.Linear(128, 5))
    return of_module(net, torch.randn(batch, 8, 16), F.cross_entropy, classes(batch, 5))


@network
def _deep_set(batch):
    inner = nn.Sequential(nn.Linear(3, 32), nn.ELU(), nn.Linear(32, 32), nn.ELU())
    outer = nn.Sequential(nn.Linear(64, 32), nn.ELU(), nn.Linear(32, 4))

    class DeepSet(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.outer = inner, outer

        def forward(self, x):
            h = self.inner(x)
            return self.outer(torch.cat([h.mean(-2), h.amax(-2)], -1))

    return of_module(DeepSet(), torch.randn(batch, 10, 3), F.huber_loss)


# ---- convolutions ----------------------------------------------------------------------------------------------------------


@network
def _cnn_max_pool(batch):
    net = nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 12, 3),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(48, 10),
    )
    return of_module(net, torch.randn(batch, 1, 12, 12), F.cross_entropy, classes(batch, 10))


@network
def _cnn_avg_pool_batch_norm(batch):
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.SiLU(), nn.AvgPool2d(2),
        nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.SiLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10),
    )  # fmt: skip
    net(torch.randn(16, 3, 10, 10))
    return of_module(net, torch.randn(batch, 3, 10, 10), F.cross_entropy, classes(batch, 10))


@network
def _resnet_block(batch):
    body = nn.Sequential(
        nn.Conv2d(8, 8, 3, padding=1, bias=False),
        nn.GroupNorm(2, 8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1, bias=False),
        nn.GroupNorm(2, 8),
    )
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1),
        nn.ReLU(),
        Residual(body),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(32, 10),
    )
    return of_module(net, torch.randn(batch, 3, 12, 12), F.cross_entropy, classes(batch, 10))


@network
def _conv1d(batch):
    net = nn.Sequential(
        nn.Conv1d(2, 8, 5, padding=2),
        nn.Tanh(),
        nn.Conv1d(8, 8, 5, padding=4, dilation=2),
        nn.Tanh(),
        nn.Conv1d(8, 1, 5, padding=2),
    )
    return of_module(net, torch.randn(batch, 2, 24))


@network
def _autoencoder(batch):
    net = nn.Sequential(
        nn.Conv2d(1, 6, 3, stride=2, padding=1), nn.LeakyReLU(), nn.Conv2d(6, 6, 3, padding=1), nn.LeakyReLU(),
        nn.Upsample(scale_factor=2, mode="bilinear"), nn.Conv2d(6, 1, 3, padding=1), nn.Sigmoid(),
    )  # fmt: skip
    return of_module(net, torch.rand(batch, 1, 8, 8), F.binary_cross_entropy, torch.rand(batch, 1, 8, 8))


# ---- sequences -------------------------------------------------------------------------------------------------------------


@network
def _transformer_layer(batch):
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    net = nn.Sequential(layer, nn.Flatten(), nn.Linear(96, 4))
    torch.backends.mha.set_fastpath_enabled(False)  # which has no derivatives; both sides take the ordinary path
    return of_module(net, torch.randn(batch, 6, 16))


@network
def _causal_attention(batch):
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.qkv, self.out = nn.LayerNorm(16), nn.Linear(16, 48), nn.Linear(16, 16)

        def forward(self, x):
            q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
            h = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            return x + self.out(h.transpose(1, 2).flatten(2))

    return of_module(Attention(), torch.randn(batch, 6, 16))


@network
def _gru_cell(batch):
    class Rollout(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell, self.out = nn.GRUCell(4, 16), nn.Linear(16, 2)

        def forward(self, x):
            h = x.new_zeros(x.shape[0], 16)
            for step in x.unbind(1):
                h = self.cell(step, h)
            return self.out(h)

    return of_module(Rollout(), torch.randn(batch, 6, 4))


@network
def _lstm(batch):
    class Last(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm, self.out = nn.LSTM(4, 16, batch_first=True), nn.Linear(16, 2)

        def forward(self, x):
            return self.out(self.lstm(x)[0][:, -1])

    return of_module(Last(), torch.randn(batch, 6, 4))


@network
def _embedding_bag(batch):
    ids = torch.randint(0, 50, (7,))
    parameters = {"table": torch.randn(50, 16), "w": torch.randn(16, 3) / 4}

    def call(p, weights):
        bags = ids.expand(weights.shape[0], 7)
        return F.embedding_bag(bags, p["table"], per_sample_weights=weights, mode="sum").tanh() @ p["w"]

    return of_function(parameters, call, torch.rand(batch, 7))


@network
def _graph_layer(batch):
    source, target = torch.randint(0, 12, (2, 40))
    parameters = {"message": torch.randn(8, 16) / 3, "self": torch.randn(8, 16) / 3, "out": torch.randn(16, 2) / 4}

    def call(p, x):
        messages = x[:, source] @ p["message"]
        received = torch.zeros(x.shape[0], 12, 16, dtype=x.dtype, device=x.device).index_add(1, target, messages)
        return (received + x @ p["self"]).relu().sum(1) @ p["out"]

    return of_function(parameters, call, torch.randn(batch, 12, 8))


# ---- likelihoods -----------------------------------------------------------------------------------------------------------


@network
def _coupling_flow(batch):
    """Log-density of affine coupling steps."""

    class Flow(nn.Module):
        def __init__(self):
            super().__init__()
            self.steps = nn.ModuleList(nn.Sequential(nn.Linear(3, 32), nn.Tanh(), nn.Linear(32, 6)) for _ in range(4))

        def forward(self, x):
            volume = x.new_zeros(x.shape[0])
            for step in self.steps:
                a, b = x.chunk(2, -1)
                scale, shift = step(a).chunk(2, -1)
                x = torch.cat([b * scale.tanh().exp() + shift, a], -1)
                volume = volume + scale.tanh().sum(-1)
            return volume - 0.5 * x.square().sum(-1)

    return of_module(Flow(), torch.randn(batch, 6), lambda y, _: -y.mean())


@network
def _vae(batch):
    """The negative evidence bound of every sample, with the noise given."""

    class Bound(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))
            self.decoder = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 16))
            self.register_buffer("noise", torch.randn(4))

        def forward(self, x):
            mean, log_variance = self.encoder(x).chunk(2, -1)
            decoded = self.decoder(mean + self.noise * (0.5 * log_variance).exp())
            likelihood = F.binary_cross_entropy_with_logits(decoded, x.sigmoid(), reduction="none").sum(-1)
            return likelihood - 0.5 * (1 + log_variance - mean.square() - log_variance.exp()).sum(-1)

    return of_module(Bound(), torch.randn(batch, 16), lambda y, _: y.mean())


@network
def _contrastive(batch):
    """InfoNCE over the eight pairs of each sample."""
    encoder = nn.Sequential(nn.Linear(6, 24), nn.ReLU(), nn.Linear(24, 8))

    class Pairs(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = encoder

        def forward(self, x):
            a, b = F.normalize(self.encoder(x), dim=-1).unbind(-3)
            logits = a @ b.transpose(-1, -2) / 0.2
            return -logits.log_softmax(-1).diagonal(dim1=-2, dim2=-1).mean(-1)

    return of_module(Pairs(), torch.randn(batch, 2, 8, 6), lambda y, _: y.mean())


@network
def _gaussian_process(batch):
    """Negative marginal likelihood of 40 points in length scale, amplitude and noise; the observations are the parameters."""
    at = torch.linspace(0, 4, 40)
    distance = (at[:, None] - at).square()
    eye = torch.eye(40)

    def call(p, h):
        length, amplitude, noise = h.exp()[..., None, None].unbind(-3)
        kernel = amplitude * (-0.5 * distance / length.square()).exp() + (noise + 1e-2) * eye
        chol = torch.linalg.cholesky(kernel)
        z = torch.linalg.solve_triangular(chol, p["y"][:, None].expand(*h.shape[:-1], 40, 1), upper=False)
        return 0.5 * z.square().sum((-1, -2)) + chol.diagonal(dim1=-2, dim2=-1).log().sum(-1)

    return of_function({"y": torch.sin(2 * at)}, call, 0.3 * torch.randn(batch, 3), lambda y, _: y.mean())


# ---- mechanics and geometry ------------------------------------------------------------------------------------------------


@network
def _kinematic_chain(batch):
    """Tip positions of a chain of six joints: 4 x 4 transforms filled in place."""

    def call(p, angles):
        pose = torch.eye(4, dtype=angles.dtype, device=angles.device).expand(*angles.shape[:-1], 4, 4)
        for joint in range(6):
            s, c = angles[..., joint].sin(), angles[..., joint].cos()
            step = angles.new_zeros(*angles.shape[:-1], 4, 4)  # which vmap knows to be one for each sample
            step[..., 0, 0], step[..., 0, 1], step[..., 1, 0], step[..., 1, 1] = c, -s, s, c
            step[..., 2, 2] = step[..., 3, 3] = 1
            step[..., 0, 3] = p["length"][joint]
            step[..., 2, 3] = p["offset"][joint] * s
            pose = pose @ step
        return pose[..., :3, 3]

    return of_function({"length": torch.rand(6) + 0.5, "offset": torch.rand(6)}, call, torch.randn(batch, 6))


@network
def _pose_graph(batch):
    """Residuals of planar poses (x, y, angle) around a loop with closures; the measurements are the parameters."""
    i = torch.tensor([0, 1, 2, 3, 4, 5, 6, 7, 0, 2])
    j = torch.tensor([1, 2, 3, 4, 5, 6, 7, 0, 4, 6])

    def call(p, poses):
        poses = poses.unflatten(-1, (8, 3))
        a, b = poses[..., i, :], poses[..., j, :]
        d, turn = b - a, a[..., 2]
        s, c = turn.sin(), turn.cos()
        local = torch.stack([c * d[..., 0] + s * d[..., 1], c * d[..., 1] - s * d[..., 0], torch.sin(d[..., 2])], -1)
        return (local - p["measured"]).flatten(-2)

    return of_function({"measured": torch.randn(10, 3)}, call, torch.randn(batch, 24))


@network
def _neural_ode(batch):
    """Four steps of the classical Runge-Kutta method through a network."""
    field = nn.Sequential(nn.Linear(4, 24), nn.Tanh(), nn.Linear(24, 4))

    class Rollout(nn.Module):
        def __init__(self):
            super().__init__()
            self.field = field

        def forward(self, x, h=0.1):
            for _ in range(4):
                k1 = self.field(x)
                k2 = self.field(x + h / 2 * k1)
                k3 = self.field(x + h / 2 * k2)
                k4 = self.field(x + h * k3)
                x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
            return x

    return of_module(Rollout(), torch.randn(batch, 4))


@network
def _lennard_jones(batch):
    i, j = torch.triu_indices(8, 8, 1)

    def call(p, x):
        r2 = (x[..., i, :] - x[..., j, :]).square().sum(-1) + 0.5
        s6 = (p["sigma"].square() / r2) ** 3
        return (4 * p["epsilon"] * (s6.square() - s6)).sum(-1)

    parameters = {"sigma": torch.tensor(1.1), "epsilon": torch.tensor(0.7)}
    return of_function(parameters, call, 2 * torch.randn(batch, 8, 3), lambda y, _: y.mean())


@network
def _spring_net(batch):
    i = torch.arange(15)

    def call(p, x):
        stretch = (x[..., i + 1, :] - x[..., i, :]).norm(dim=-1) - p["rest"]
        return 0.5 * (p["stiffness"] * stretch.square()).sum(-1)

    parameters = {"stiffness": torch.rand(15) + 0.5, "rest": torch.rand(15)}
    return of_function(parameters, call, torch.randn(batch, 16, 3), lambda y, _: y.mean())


@network
def _pinn(batch):
    """Burgers' residual of a network at points (t, x), its derivatives by nested `torch.func` transforms."""
    net = nn.Sequential(nn.Linear(2, 20), nn.Tanh(), nn.Linear(20, 20), nn.Tanh(), nn.Linear(20, 1))
    own = dict(net.named_parameters())

    def call(p, points):
        def u(z):
            return functional_call(net, p, (z,)).squeeze(-1)

        def residual(z):
            value, (_, slope) = u(z), torch.func.grad(u)(z)
            curvature = torch.func.grad(lambda w: torch.func.grad(u)(w)[1])(z)[1]
            return torch.func.grad(u)(z)[0] + value * slope - 0.01 * math.pi * curvature

        return torch.func.vmap(residual)(points)

    return of_function(own, call, torch.rand(batch, 2))


# ---- gradients inside ------------------------------------------------------------------------------------------------------


class Equilibrium(torch.autograd.Function):
    """z = tanh(z W + u); its backward solves the linear system at the fixed point by iteration (Bai et al. 2019)."""

    @staticmethod
    def forward(u, w):
        z = torch.zeros_like(u)
        for _ in range(12):
            z = torch.tanh(z @ w + u)
        return z

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[1], output)

    @staticmethod
    def backward(ctx, g):
        w, z = ctx.saved_tensors
        slope = 1 - z.square()
        v = g * slope
        for _ in range(12):
            v = g * slope + (v @ w.mT) * slope
        return v, z.flatten(0, -2).mT @ v.flatten(0, -2)

    generate_vmap_rule = True


@network
def _equilibrium(batch):
    parameters = {"in": torch.randn(4, 12) / 2, "w": torch.randn(12, 12) / 12, "out": torch.randn(12, 2) / 3}
    return of_function(parameters, lambda p, x: Equilibrium.apply(x @ p["in"], p["w"]) @ p["out"], torch.randn(batch, 4))


@network
def _meta_learning(batch):
    """The prediction after two steps of gradient descent on each sample's own support points."""
    inputs, labels = torch.randn(2, 10, 3)

    def predict(p, x):
        return (x @ p["a"]).tanh() @ p["b"]

    def call(p, x):
        adapted = p
        for _ in range(2):
            loss = lambda q: (predict(q, inputs) - labels[:, :1]).square().mean()
            steps = torch.func.grad(loss)(adapted)
            adapted = {name: adapted[name] - 0.1 * steps[name] for name in adapted}
        return predict(adapted, x)

    return of_function({"a": torch.randn(3, 16), "b": torch.randn(16, 1) / 4}, call, torch.randn(batch, 3))
