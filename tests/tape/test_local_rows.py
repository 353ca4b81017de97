"""Nodes that are called with their batch tied: batch Jacobians take as many calls as one sample has rows, and are right.

Extents are chosen such that a batch is as long as axes that are no batch.
"""

import pytest
import torch
import wengert
from support.check import DEVICE, check_against_torch
from support.compare import assert_same
from torch.nn import functional as F

D = torch.float64
SEED = 0


def r(*shape):
    return torch.randn(*shape, dtype=D, generator=torch.Generator().manual_seed(SEED)).to(DEVICE)


LU = torch.linalg.lu_factor
REGULAR = r(4, 4, 4) + 3 * torch.eye(4, dtype=D, device=DEVICE)
POSITIONS = torch.tensor([[0, 2, 2, 1], [3, 3, 0, 1], [1, 2, 3, 0], [2, 0, 0, 0]], device=DEVICE)
TARGETS = torch.tensor([[1, 2], [2, 1], [1, 1], [2, 2]], device=DEVICE)
LENGTHS = (torch.full((4,), 6), torch.tensor([2, 1, 2, 2]))
POOLED, UNPOOLED_AT = F.max_pool2d(r(4, 4, 4, 4), 2, return_indices=True)
GRID = r(4, 3, 3, 2).tanh()

# A function of samples along the first axis, samples, and the node that is called.
ROWS = {
    "lu": (lambda x: torch.linalg.lu(x)[1], REGULAR, "LinalgLu"),
    "lu_factor": (lambda x: LU(x)[0], REGULAR, "LinalgLuFactorEx"),
    "lu_unpack": (lambda x: torch.lu_unpack(x, LU(x.detach())[1])[2], r(4, 4, 4), "LuUnpack"),
    "lstsq": (lambda x: torch.linalg.lstsq(x, r(4, 4, 4))[0], REGULAR, "LinalgLstsq"),
    "lstsq's other side": (lambda x: torch.linalg.lstsq(r(4, 4, 4), x)[0], r(4, 4, 4), "LinalgLstsq"),
    "cdist": (lambda x: torch.cdist(x, r(4, 4, 2).sin()), r(4, 3, 2), "Cdist"),
    "nearest exact": (lambda x: F.interpolate(x, scale_factor=2.0, mode="nearest-exact"), r(4, 4, 4), "UpsampleNearestExact1D"),
    "antialias": (
        lambda x: F.interpolate(x, size=(2, 4), mode="bilinear", antialias=True),
        r(4, 4, 4, 4),
        "UpsampleBilinear2DAa",
    ),
    "max_unpool": (lambda x: F.max_unpool2d(x, UNPOOLED_AT, 2), POOLED, "MaxUnpool2D"),
    "unfold": (lambda x: F.unfold(x, 2), r(4, 1, 3, 3), "Im2Col"),
    "unfold of single elements": (lambda x: F.unfold(x, 1), r(4, 4, 2, 2), "Im2Col"),
    "fold": (lambda x: F.fold(x, (3, 3), 2), r(4, 4, 4), "Col2Im"),
    "channel_shuffle": (lambda x: F.channel_shuffle(x, 2), r(4, 4, 2, 2), "ChannelShuffle"),
    "grid_sample": (lambda x: F.grid_sample(x, GRID, align_corners=False), r(4, 2, 4, 3), "GridSampler2D"),
    "grid_sample's grid": (lambda x: F.grid_sample(r(4, 2, 4, 3), x, align_corners=True), GRID, "GridSampler2D"),
    "scatter_reduce": (lambda x: r(4, 4).scatter_reduce(1, POSITIONS, x, "mean"), r(4, 4), "ScatterReduce"),
    "scatter_reduce of few": (lambda x: r(4, 4).scatter_reduce(1, POSITIONS[:, :2], x, "prod"), r(4, 2), "ScatterReduce"),
    "scatter_reduce into": (lambda x: x.scatter_reduce(1, POSITIONS, r(4, 4), "amax"), r(4, 4), "ScatterReduce"),
    "index_reduce": (lambda x: r(4, 4).index_reduce(1, POSITIONS[0], x, "mean"), r(4, 4), "IndexReduce"),
    "ctc_loss": (
        lambda x: F.ctc_loss(x.transpose(0, 1).log_softmax(-1), TARGETS, *LENGTHS, reduction="none"),
        r(4, 6, 4),
        "CtcLoss",
    ),
}
if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13):  # which has neither a second derivative nor a batching rule
    ROWS = {name: row for name, row in ROWS.items() if not name.startswith("grid_sample")}
CHECKED = {"unfold", "fold", "grid_sample", "scatter_reduce", "index_reduce"}  # by differences, which takes long
BATCHED_BY_ROW = {"cdist"}  # whose batching rule is wrong in PyTorch


def counted(f, x):
    wengert.reset_stats()
    calls = wengert._C.counters()["node_calls"]
    return wengert.batch_jacobian(f, x), wengert._C.counters()["node_calls"] - calls


@pytest.mark.skipif(DEVICE.type == "cuda", reason="GPUs have nodes of their own for some")
@pytest.mark.parametrize("name", ROWS)
def test_batch_jacobian(name):
    f, x, node = ROWS[name]
    jacobian, calls = counted(f, x)
    assert not wengert.stats().fallback
    dense = torch.autograd.functional.jacobian(f, x)
    own = dense.movedim(f(x).dim(), 1)  # (samples, samples, *out, *in)
    assert_same(jacobian, torch.stack([own[b, b] for b in range(len(x))]))
    table = wengert.explain(f, x)
    assert any(row["node"].startswith(node) and row["kind"] == "local" for row in table), table
    rows = f(x)[0].numel()
    assert calls <= (rows if name in BATCHED_BY_ROW else 1)


@pytest.mark.skipif(DEVICE.type == "cuda", reason="GPUs have nodes of their own for some")
@pytest.mark.parametrize("name", ROWS)
def test_modes(name):
    f, x, _ = ROWS[name]
    modes = ("value", "graph", "gradient", "strided")
    if not name.startswith("lstsq"):  # whose bits depend on where its operands lie
        modes += ("jacobian", "hessian")
    if name in CHECKED:
        modes += ("gradcheck",)
    check_against_torch(lambda x: f(x).sin(), x, modes=modes)


CELLS = {"gru": torch.nn.GRUCell, "lstm": torch.nn.LSTMCell}


@pytest.mark.skipif(DEVICE.type == "cuda", reason="GPUs have nodes of their own for these")
@pytest.mark.parametrize("name", CELLS)
@pytest.mark.parametrize("batch", [2, 6, 8])
def test_recurrent_cells(name, batch):
    """A batch as long as the biases, of three or four times the hidden size, is not tied to them."""
    torch.manual_seed(0)
    cell = CELLS[name](3, 2).double()
    x = r(batch, 3)

    def f(x):
        out = cell(x)
        return torch.cat(out, 1) if isinstance(out, tuple) else out

    jacobian = counted(f, x)[0]
    assert_same(jacobian, torch.stack([torch.autograd.functional.jacobian(lambda s: f(s[None])[0], row) for row in x]))
    assert not wengert.stats().fallback
    parameters = tuple(cell.parameters())
    y = f(x)
    ours = wengert.jacobian(y, parameters)
    assert_same(list(ours), [row_loop(y, p) for p in parameters])


def row_loop(y, p):
    rows = [torch.autograd.grad(e, p, retain_graph=True)[0] for e in y.flatten()]
    return torch.stack(rows).reshape(y.shape + p.shape)
