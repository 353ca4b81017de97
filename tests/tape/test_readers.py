"""What the tape holds for PyTorch's nodes: the operator of each family, in the words of ``_C.tape``."""

import pytest
import torch
import torch.nn.functional as F
import wengert
from support import zoo
from support.check import as_tuple
from support.engine_zoo import CASES
from wengert import _C

INDEX = torch.tensor([2, 0])
OPERATORS = {
    # name: (function of x (4, 3), operator of its node)
    "elementwise": (lambda x: x.sin(), "gather(4,3)[0+1*i0, 0+1*i1] p0=s0[0+1*i0, 0+1*i1]"),
    "broadcast": (lambda x: x.expand(2, 4, 3), "gather(4,3)[0+1*i1, 0+1*i2]"),
    "sum": (lambda x: x.sum(0), "gather(4,3)[0+1*i1, 0+1*i0] over (4)"),
    "mean, kept axis": (lambda x: x.mean(1, True), "gather(4,3)[0+1*i0, 0+1*i2] over (3)"),
    "select": (lambda x: x[1], "gather(4,3)[1, 0+1*i0]"),
    "slice": (lambda x: x[1::2], "gather(4,3)[1+2*i0, 0+1*i1]"),
    "transpose": (lambda x: x.t(), "gather(4,3)[0+1*i1, 0+1*i0]"),
    "flip": (lambda x: x.flip(0), "gather(4,3)[3+-1*i0, 0+1*i1]"),
    "diagonal": (lambda x: x.diagonal(), "gather(4,3)[0+1*i0, 0+1*i0]"),
    "window": (lambda x: x.unfold(0, 2, 1), "gather(4,3)[0+1*i0+1*i2, 0+1*i1]"),
    "matrix product": (lambda x: x @ torch.ones(3, 2), "gather(4,3)[0+1*i0, 0+1*i2] over (3) p0=s0[0+1*i2, 0+1*i1]"),
    "index": (lambda x: x.index_select(0, INDEX), "gather(4,3)[0+s0[0+1*i0], 0+1*i1]"),
    "embedding": (lambda x: F.embedding(INDEX, x), "gather(4,3)[0+s0[0+1*i0], 0+1*i1]"),
    "cat": (lambda x: torch.cat([torch.ones(2, 3), x]), "scatter(4,3) 2+1*x0 0+1*x1"),
    "pad": (lambda x: F.pad(x, (1, 2)), "scatter(4,3) 0+1*x0 1+1*x1"),
    "roll": (
        lambda x: x.roll(1, 0),
        "scatter(3,3) 1+1*x0 0+1*x1 . gather(4,3)[0+1*i0, 0+1*i1] + scatter(1,3) 0+1*x0 0+1*x1 . gather(4,3)[3+1*i0, 0+1*i1]",
    ),
    "index_add": (lambda x: torch.zeros(5, 3).index_add(0, torch.tensor([0, 0, 4, 2]), x), "index_scatter(4,3) axis 0 s0"),
    "reshape": (lambda x: x.reshape(2, 6), "reshape(4,3)"),
    "softmax": (
        lambda x: x.softmax(1),
        "identity + gather(4,3)[0+1*i0, 0+1*i2] over (3) p0=s0[0+1*i0, 0+1*i1]"
        ", then gather(4,3)[0+1*i0, 0+1*i1] p0=s0[0+1*i0, 0+1*i1]",
    ),
    "cumsum ties the other axes": (lambda x: x.cumsum(0), "local(-1,1)"),
    "layer norm ties the batch": (lambda x: F.layer_norm(x, (3,)), "local(0,-1)"),
    "identity": (lambda x: x.clone(), "identity"),
}


def tape(outputs, inputs):
    """The nodes of the tape: [(name, operators of their edges)]."""
    nodes = []
    for line in _C.tape(outputs, inputs).splitlines():
        if line.startswith("  "):
            nodes[-1][1].append(line.split(": ", 1)[1])
        else:
            nodes.append((line.split(" ")[1], []))
    return nodes


def leaf():
    return torch.linspace(0.1, 0.9, 12).reshape(4, 3).requires_grad_()


@pytest.mark.parametrize("name", OPERATORS)
def test_operator(name):
    function, operator = OPERATORS[name]
    x = leaf()
    (_, operators), (last, none) = tape([function(x)], [x])
    assert operators == [operator]
    assert last.endswith("AccumulateGrad") and none == []


class Custom(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, g):
        return g * 2


@pytest.mark.parametrize("function", (Custom.apply, lambda x: torch.linalg.inv(x[:3])), ids=("custom", "one matrix"))
def test_what_has_no_reader_is_opaque(function):
    x = leaf()
    assert tape([function(x)], [x])[0][1] == ["opaque"]


def test_a_convolution_is_a_gather_in_its_weights():
    w = torch.ones(4, 3, 2, requires_grad=True)
    y = F.conv1d(torch.ones(2, 3, 6), w, stride=2, padding=1)
    assert dict(tape([y], [w]))["ConvolutionBackward0"] == [
        "gather(4,3,2)[0+1*i1, 0+1*i3, 0+1*i4] over (3,2) p0=s0[0+1*i0, 0+1*i3, 0+2*i2+1*i4]"
    ]


@pytest.mark.parametrize(("stride", "padding", "dilation"), [(1, 0, 1), (2, 1, 1), (1, 1, 2)])
def test_one_number_stands_for_all_axes_of_a_convolution(stride, padding, dilation):
    x, w = torch.rand(2, 3, 5, 6), torch.rand(4, 3, 2, 2, requires_grad=True)
    one, two = (
        dict(tape([torch.convolution(x, w, None, n * [stride], n * [padding], n * [dilation], False, [0], 1)], [w]))
        for n in (1, 2)
    )
    assert one == two


def test_both_factors_of_a_product():
    x = leaf()
    y = x[:1]
    node, operators = tape([x * y], [x, y])[0]
    assert node == "MulBackward0"
    assert operators == [
        "gather(4,3)[0+1*i0, 0+1*i1] p0=s1[0, 0+1*i1]",
        "gather(1,3)[0, 0+1*i1] p0=s0[0+1*i0, 0+1*i1]",
    ]


def test_stops_at_the_inputs_and_leaves_out_what_leads_elsewhere():
    x, other = leaf(), leaf()
    y = x.sin()
    nodes = tape([(y * other).cos()], [y])
    assert [name for name, _ in nodes] == ["CosBackward0", "MulBackward0", "SinBackward0"]
    assert [len(operators) for _, operators in nodes] == [1, 1, 0]


def test_a_saved_tensor_is_held_once():
    x = leaf()
    factor = torch.rand(4, 3)
    slots = {word.split("=")[1].split("[")[0] for _, ops in tape([x * factor + x.sin() * factor], [x]) for op in ops
             for word in op.split() if word.startswith("p0=")}  # fmt: skip
    assert slots == {"s0", "s1"}  # the factor, and x for the sine


def test_views_of_one_entry_are_held_once_where_no_graph_is_made():
    x = leaf()
    y = sum(x[0, 0] * x[0, 1] for _ in range(3))

    def slots():
        words = [word for _, operators in tape([y], [x]) for operator in operators for word in operator.split()]
        return {word.split("=")[1] for word in words if word.startswith("p0=")}

    assert len(slots()) == 6
    with torch.no_grad():
        assert slots() == {"s0[]", "s1[]"}


@pytest.mark.parametrize(
    ("make", "message"),
    [(lambda x: torch.fft.fft(x), "complex"), (lambda x: x.to_sparse().to_dense(), "layout|sparse")],
    ids=("complex output", "sparse"),
)
def test_what_must_not_be_walked(make, message):
    x = leaf()
    with pytest.raises(_C.Unsupported, match=message):
        _C.tape([make(x)], [x])


def test_complex_values_are_pairs_of_reals():
    x = leaf()
    text = _C.tape([(torch.fft.rfft(x) * 1j).real], [x])
    nodes = dict(tape([(torch.fft.rfft(x) * 1j).real], [x]))
    assert "MulBackward0 pairs of Float(4,2,2)" in text, text
    assert nodes["MulBackward0"] == ["local(0,1,-1)"], "the two parts are coupled, all else stays tied"
    assert nodes["FftR2CBackward0"] == ["local(0,-1,-1)"]


def test_hooks_are_refused():
    x = leaf()
    y, elsewhere = x.sin(), x.cos()
    elsewhere.register_hook(lambda g: g)
    assert tape([y * 2], [x])
    y.register_hook(lambda g: g)
    with pytest.raises(_C.Unsupported, match="hooks"):
        _C.tape([y * 2], [x])


def test_a_graph_over_several_devices_is_refused():
    """The meta device stands for any second one."""
    x = leaf()
    with pytest.raises(_C.Unsupported, match="several devices"):
        _C.tape([x.sin().to("meta") * 2], [x])


@pytest.mark.parametrize("name", CASES)
def test_what_readers_derive_lies_on_the_graphs_device(name, monkeypatch):
    """On a GPU a mask left on the host would send the whole call to PyTorch, unseen by whoever compares numbers only."""
    meta = torch.device("meta")
    monkeypatch.setattr(zoo, "DEVICE", meta)
    with meta:
        try:
            fn, inputs = CASES[name].build(zoo.Source(torch.float64))
            xs = [x.detach().requires_grad_() if x.is_floating_point() else x for x in as_tuple(inputs)]
            ys = [y for y in as_tuple(fn(*xs)) if isinstance(y, torch.Tensor) and y.requires_grad]
        except (NotImplementedError, RuntimeError) as error:
            assert "meta" in str(error).lower()
            pytest.skip("looks at numbers, of which a meta tensor has none")
    try:
        _C.tape(ys, [x for x in xs if x.requires_grad])
    except _C.Unsupported as refusal:
        assert "devices" not in str(refusal)


def test_a_device_without_kernels_takes_pytorchs_path():
    x = torch.rand(3, device="meta", requires_grad=True)
    with pytest.raises(_C.Unsupported, match="no kernels"):
        _C.jacobian([x.sin()], [x], False)
    assert wengert.jacobian(x.sin(), x).shape == (3, 3)
