"""The transforms against torch.func: structure, aux, argnums, vmap options, nesting, dtype, and what stays differentiable."""

# ruff: noqa: B023 - the closures run inside their loop
import itertools
import weakref

import pytest
import torch
import wengert
from support.compare import Tolerance, assert_same, assert_same_call
from wengert import func


def vec(*shape, dtype=torch.float64, start=0.5):
    n = torch.Size(shape).numel()
    return torch.linspace(start, start + 1, n, dtype=dtype).reshape(shape)


def both(call, where=""):
    return assert_same_call(lambda: call(func), lambda: call(torch.func), where)


DIRECT = {
    "jacrev": lambda m: m.jacrev(torch.sin)(vec(3)),
    "jacrev pair of outputs": lambda m: m.jacrev(lambda x: (x.sin(), x.sum()))(vec(3)),
    "jacrev dict output": lambda m: m.jacrev(lambda x: {"a": x.sin(), "b": [x.sum()]})(vec(3)),
    "jacrev argnums 1": lambda m: m.jacrev(torch.mul, 1)(vec(3), vec(3)),
    "jacrev argnums -1": lambda m: m.jacrev(torch.mul, -1)(vec(3), vec(3)),
    "jacrev argnums (0, 1)": lambda m: m.jacrev(torch.mul, (0, 1))(vec(3), vec(3)),
    "jacrev argnums (1,)": lambda m: m.jacrev(torch.mul, (1,))(vec(3), vec(3)),
    "jacrev dict input": lambda m: m.jacrev(lambda p: p["w"] * p["b"])({"w": vec(3), "b": vec(1)}),
    "jacrev aux": lambda m: m.jacrev(lambda x: (x.sin(), {"n": x.sum()}), has_aux=True)(vec(3)),
    "jacrev chunks": lambda m: m.jacrev(torch.sin, chunk_size=2)(vec(3)),
    "jacrev unused": lambda m: m.jacrev(lambda x, y: y.sin())(vec(3), vec(2)),
    "jacrev integer side input": lambda m: m.jacrev(lambda x, k: x[k])(vec(3), torch.tensor([2, 0])),
    "jacrev number side input": lambda m: m.jacrev(lambda x, k: x * k)(vec(3), 4.0),
    "jacrev same tensor twice": lambda m: (lambda x: m.jacrev(torch.mul)(x, x))(vec(3)),
    "jacrev of a module": lambda m: m.jacrev(torch.nn.Tanh())(vec(3)),
    "jacfwd": lambda m: m.jacfwd(torch.sin)(vec(3)),
    "jacfwd argnums 1": lambda m: m.jacfwd(torch.mul, 1)(vec(3), vec(3)),
    "jacfwd aux": lambda m: m.jacfwd(lambda x: (x.sin(), x.sum()), has_aux=True)(vec(3)),
    "jacfwd to another dtype": lambda m: m.jacfwd(lambda x: x.sin().double())(vec(3, dtype=torch.float32)),
    "jacfwd of an integer output": lambda m: m.jacfwd(lambda x: (x.sin(), (x * 10).long()))(vec(3)),
    "jacrev to another dtype": lambda m: m.jacrev(lambda x: x.double())(vec(3, dtype=torch.float32)),
    "hessian": lambda m: m.hessian(lambda x: x.sin().prod())(vec(3)),
    "hessian of a vector": lambda m: m.hessian(lambda x: x.sin() * x.sum())(vec(3)),
    "hessian of a pair": lambda m: m.hessian(lambda x: (x.sin().sum(), x.prod()))(vec(3)),
    "hessian argnums": lambda m: m.hessian(lambda x, y: x.sin().sum() * y.prod(), (0, 1))(vec(3), vec(2)),
    "hessian dict": lambda m: m.hessian(lambda p: p["w"].sin().sum() * p["b"].prod())({"w": vec(3), "b": vec(2)}),
    "hessian of a linear function": lambda m: m.hessian(torch.sum)(vec(3)),
    "jacfwd of jacrev": lambda m: m.jacfwd(m.jacrev(lambda x: x.sin() * x.sum()))(vec(3)),
    "jacrev of jacrev": lambda m: m.jacrev(m.jacrev(lambda x: x.sin() * x.sum()))(vec(3)),
    "jacrev of grad": lambda m: m.jacrev(m.grad(lambda x: x.sin().prod()))(vec(3)),
    "grad": lambda m: m.grad(lambda x: x.sin().prod())(vec(3)),
    "grad argnums": lambda m: m.grad(torch.dot, (1, 0))(vec(3), vec(3)),
    "grad aux": lambda m: m.grad(lambda x: (x.sin().prod(), x * 2), has_aux=True)(vec(3)),
    "grad keyword": lambda m: m.grad(lambda x, *, s: (x * s).sum())(vec(3), s=2.0),
    "grad dict": lambda m: m.grad(lambda p: p["w"].sum() * p["b"].prod())({"w": vec(3), "b": vec(2)}),
    "grad of a constant": lambda m: m.grad(lambda x: torch.ones(()))(vec(3)),
    "grad_and_value": lambda m: m.grad_and_value(lambda x: x.sin().prod())(vec(3)),
    "grad_and_value aux": lambda m: m.grad_and_value(lambda x: (x.sin().prod(), x * 2), has_aux=True)(vec(3)),
    "grad of grad": lambda m: m.grad(m.grad(lambda x: x**3))(vec()),
    "third derivative": lambda m: m.grad(m.grad(m.grad(torch.sin)))(vec()),
    "vjp": lambda m: m.vjp(torch.sin, vec(3))[1](vec(3)),
    "jvp": lambda m: m.jvp(torch.sin, (vec(3),), (vec(3),)),
    "perturbation confusion": lambda m: m.grad(lambda x: x * m.grad(lambda y: x + y)(vec()))(vec()),
}


@pytest.mark.parametrize("call", DIRECT.values(), ids=DIRECT)
def test_direct(call):
    both(call)


def f(x):
    return torch.stack([x.prod(), (x * x[0]).sum()])


def loss(p, x, y):
    return ((torch.tanh(p["w"] @ x) + p["b"]).sum() - y) ** 2


PARAMETERS = {"w": vec(2, 3), "b": vec(2)}
BATCHED = {
    "jacrev": lambda m: m.vmap(m.jacrev(f))(vec(4, 3)),
    "jacfwd": lambda m: m.vmap(m.jacfwd(f))(vec(4, 3)),
    "hessian": lambda m: m.vmap(m.hessian(f))(vec(4, 3)),
    "hessian of a scalar": lambda m: m.vmap(m.hessian(lambda x: x.sin().prod()))(vec(4, 3)),
    "jacrev of jacrev": lambda m: m.vmap(m.jacrev(m.jacrev(f)))(vec(4, 3)),
    "one sample": lambda m: m.vmap(m.jacrev(f))(vec(1, 3)),
    "no sample": lambda m: m.vmap(m.jacrev(f))(vec(0, 3)),
    "in_dims 1": lambda m: m.vmap(m.jacrev(f), in_dims=1)(vec(3, 4)),
    "in_dims -1": lambda m: m.vmap(m.jacrev(f), in_dims=-1)(vec(3, 4)),
    "out_dims 1": lambda m: m.vmap(m.jacrev(f), out_dims=1)(vec(4, 3)),
    "out_dims -1": lambda m: m.vmap(m.jacrev(f), out_dims=-1)(vec(4, 3)),
    "out_dims tuple": lambda m: m.vmap(m.jacrev(f), out_dims=(1,))(vec(4, 3)),
    "chunks": lambda m: m.vmap(m.jacrev(f), chunk_size=3)(vec(7, 3)),
    "chunks out_dims 1": lambda m: m.vmap(m.jacrev(f), out_dims=1, chunk_size=3)(vec(7, 3)),
    "argnums": lambda m: m.vmap(m.jacrev(torch.mul, (0, 1)))(vec(4, 3), vec(4, 3)),
    "shared side input": lambda m: m.vmap(m.jacrev(torch.mul), in_dims=(0, None))(vec(4, 3), vec(3)),
    "jacobian in a shared input": lambda m: m.vmap(m.jacrev(torch.mul, 1), in_dims=(0, None))(vec(4, 3), vec(3)),
    "jacobian in both": lambda m: m.vmap(m.jacrev(torch.mul, (0, 1)), in_dims=(0, None))(vec(4, 3), vec(3)),
    "aux": lambda m: m.vmap(m.jacrev(lambda x: (f(x), x * 2), has_aux=True))(vec(4, 3)),
    "pytree output": lambda m: m.vmap(m.jacrev(lambda x: {"a": f(x), "b": (x.sum(),)}))(vec(4, 3)),
    "constant output": lambda m: m.vmap(m.jacrev(lambda x: torch.ones(2, dtype=x.dtype)))(vec(4, 3)),
    "grad": lambda m: m.vmap(m.grad(lambda x: x.sin().prod()))(vec(4, 3)),
    "grad of numbers": lambda m: m.vmap(m.grad(torch.sin))(vec(4)),
    "grad of grad": lambda m: m.vmap(m.grad(m.grad(torch.sin)))(vec(4)),
    "grad_and_value": lambda m: m.vmap(m.grad_and_value(lambda x: x.sin().prod()))(vec(4, 3)),
    "grad keyword": lambda m: m.vmap(m.grad(lambda x, s: (x * s).prod()))(vec(4, 3), s=vec(3)),
    "per-sample gradients": lambda m: m.vmap(m.grad(loss), (None, 0, 0))(PARAMETERS, vec(4, 3), vec(4)),
    "per-sample gradients and losses": lambda m: m.vmap(m.grad_and_value(loss), (None, 0, 0))(PARAMETERS, vec(4, 3), vec(4)),
    "per-sample gradients in both": lambda m: m.vmap(m.grad(loss, (0, 1)), (None, 0, 0))(PARAMETERS, vec(4, 3), vec(4)),
    "nested vmap": lambda m: m.vmap(m.vmap(m.jacrev(f)))(vec(2, 4, 3)),
    "lambda around it": lambda m: m.vmap(lambda x: m.jacrev(f)(x))(vec(4, 3)),
    "plain function": lambda m: m.vmap(f)(vec(4, 3)),
    "jacobian of vmap": lambda m: m.jacrev(m.vmap(f))(vec(4, 3)),
    "same randomness": lambda m: seeded(lambda: m.vmap(m.jacrev(lambda x: x * torch.rand(3)), randomness="same")(vec(4, 3))),
    "different randomness": lambda m: seeded(
        lambda: m.vmap(m.jacrev(lambda x: x * torch.rand(3)), randomness="different")(vec(4, 3))
    ),
}


def seeded(call):
    torch.manual_seed(3)
    return call()


@pytest.mark.parametrize("call", BATCHED.values(), ids=BATCHED)
def test_batched(call):
    both(call)


def test_jacfwd_with_negative_argnums_is_right():
    """torch 2.13 returns zeros here."""
    a, x = vec(3), vec(3, start=2.0)
    expected = torch.func.jacfwd(torch.mul, argnums=1)(a, x)
    assert_same(func.jacfwd(torch.mul, argnums=-1)(a, x), expected)
    assert_same(func.jacfwd(torch.mul, argnums=(-2, -1))(a, x)[1], expected)
    assert_same(torch.func.vmap(func.jacfwd(torch.mul, argnums=-1))(a[None], x[None])[0], expected)
    scalar = lambda a, x: (a * x**3).sum()
    assert_same(func.hessian(scalar, -1)(a, x), torch.func.hessian(scalar, 1)(a, x))


@pytest.mark.parametrize("name", ["jacrev", "grad", "hessian", "jacfwd"])
@pytest.mark.parametrize("grad_mode", [True, False])
@pytest.mark.parametrize("captured", [True, False])
@pytest.mark.parametrize("batched", [True, False])
def test_what_can_be_differentiated_again(name, grad_mode, captured, batched):
    """A caller's graph on the arguments, or parameters that the function captures: in or out, as in torch."""
    results = []
    for m in (func, torch.func):
        w = vec(3).requires_grad_(captured)
        x = vec(3, start=1.0).requires_grad_(not captured)
        g = (lambda x, w=w: (w * x**3).sin().sum())
        t = getattr(m, name)(g)
        with torch.set_grad_enabled(grad_mode):
            result = m.vmap(t)(torch.stack([x, 2 * x])) if batched else t(x)
        if result.requires_grad:
            result = (result, torch.autograd.grad((result * result).sum(), w if captured else x)[0])
        results.append(result)
    assert isinstance(results[0], tuple) == isinstance(results[1], tuple) == grad_mode
    assert_same(*(tuple(t.detach() for t in r) if isinstance(r, tuple) else r for r in results), tol=Tolerance(1e-7, 1e-9))


def test_values_and_aux_carry_no_graph_of_ours():
    x = vec(3)
    _, (value, aux) = func.grad_and_value(lambda x: (x.prod(), x * 2), has_aux=True)(x)
    assert not value.requires_grad and not aux.requires_grad
    _, aux = func.vmap(func.jacrev(lambda x: (f(x), x * 2), has_aux=True))(vec(4, 3))
    assert not aux.requires_grad
    assert not func.jacrev(lambda x: x)(x).requires_grad
    w = vec(3).requires_grad_()
    _, aux = func.grad(lambda x: (x.prod(), w), has_aux=True)(x)
    assert aux.requires_grad


def test_transforms_look_like_what_they_wrap():
    def named(x):
        """Words."""
        return x.sin()

    t = func.jacrev(named)
    assert (t.__name__, t.__doc__, t.__wrapped__) == ("named", "Words.", named)

    class Model:
        gain = 2.0
        slope = func.jacrev(lambda self, x: self.gain * x, argnums=1)

    assert_same(Model().slope(vec(2)), 2 * torch.eye(2, dtype=torch.float64))


def test_forward_mode_goes_through_no_grad_as_torch_s_does():
    def g(x):
        with torch.no_grad():
            s = x.sum()
        return x * s

    for call in (lambda m: m.jacfwd(g)(vec(3)), lambda m: m.vmap(m.jacfwd(g))(vec(2, 3)), lambda m: m.jacrev(g)(vec(3))):
        both(call)
    both(lambda m: m.hessian(lambda x: g(x).sum())(vec(3)))


def test_functional_call_with_a_module():
    net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2)).double()
    params = {k: v.detach() for k, v in net.named_parameters()}
    g = lambda p, x: func.functional_call(net, p, (x,))
    for name in ("jacrev", "jacfwd"):
        both(lambda m: getattr(m, name)(g)(params, vec(3)))
        both(lambda m: m.vmap(getattr(m, name)(g), (None, 0))(params, vec(4, 3)))
    both(lambda m: m.vmap(m.jacrev(g, 1), (None, 0))(params, vec(4, 3)))
    live = dict(net.named_parameters())
    total = func.vmap(func.jacrev(g, 1), (None, 0))(live, vec(4, 3)).sum()
    theirs = torch.func.vmap(torch.func.jacrev(g, 1), (None, 0))(live, vec(4, 3)).sum()
    ours = torch.autograd.grad(total, list(live.values()), allow_unused=True, materialize_grads=True)
    assert_same(ours, torch.autograd.grad(theirs, list(live.values()), allow_unused=True, materialize_grads=True))


@pytest.mark.parametrize("inner", ["jacrev", "grad", "hessian", "jacfwd"])
def test_below_torch_s_own_transforms(inner):
    g = lambda x: (x**3).sum()
    for outer in (torch.func.vmap, torch.func.jacrev, torch.func.jacfwd):
        assert_same(outer(getattr(func, inner)(g))(vec(2, 3)), outer(getattr(torch.func, inner)(g))(vec(2, 3)))


NESTED = {
    "grad of grad": lambda m, f, inner, outer: m.grad(m.grad(f, inner), outer),
    "value, and grad of grad": lambda m, f, inner, outer: m.grad_and_value(m.grad(f, inner), outer),
    "grad with a grad inside": lambda m, f, inner, outer: m.grad(lambda *a: m.grad(f, inner)(*a).sin(), outer),
    "auxiliary grad": lambda m, f, inner, outer: m.grad(lambda *a: (f(*a), m.grad(f, inner)(*a)), outer, has_aux=True),
    "jacrev of jacrev": lambda m, f, inner, outer: m.jacrev(m.jacrev(f, inner), outer),
    "jacfwd of jacrev": lambda m, f, inner, outer: m.jacfwd(m.jacrev(f, inner), outer),
    "jacrev by all of jacrev": lambda m, f, inner, outer: m.jacrev(m.jacrev(f, inner), (0, 1)),
    "grad of grad of grad": lambda m, f, inner, outer: m.grad(m.grad(m.grad(f, inner), outer), inner),
    "grad of grads": lambda m, f, inner, outer: m.grad(lambda *a: m.grad(f, 0)(*a) * m.grad(m.grad(f, 1), inner)(*a), outer),
}


@pytest.mark.parametrize("batch", [None, 1, 3])
@pytest.mark.parametrize("inner, outer", itertools.product((0, 1), (0, 1)))
@pytest.mark.parametrize("name", NESTED)
def test_nested_transforms_leave_no_history(name, inner, outer, batch):
    """A transform inside another makes leaves of arguments that do not require grad: nothing of the caller's."""
    s, t = torch.rand(2, *([batch] if batch else []), dtype=torch.float64)

    def derive(m, f):
        g = NESTED[name](m, f, inner, outer)
        return m.vmap(g) if batch else g

    kinds = []
    for x_asks, t_asks, w_asks, grad_mode in itertools.product((False, True), repeat=4):
        w = torch.tensor(1.5, dtype=torch.float64, requires_grad=w_asks)
        f = lambda x, t: torch.sin(w * x) * torch.exp(-t * w) * x * t
        with torch.set_grad_enabled(grad_mode):
            args = s.clone().requires_grad_(x_asks), t.clone().requires_grad_(t_asks)
            ours, theirs = derive(func, f)(*args), derive(torch.func, f)(*args)
        assert_same(ours, theirs)
        kinds.append([[r.requires_grad for r in torch.utils._pytree.tree_leaves(result)] for result in (ours, theirs)])
    for ours, theirs in kinds:
        assert ours == theirs
    assert not any(kinds[0][0]) and all(kinds[-1][0])


def test_a_result_without_the_captured_tensor_has_no_history():
    w, x = vec(3).requires_grad_(), vec(3)
    f = lambda x, y: (x**3).sum() + (w * y**2).sum()
    for call in (lambda m: m.grad(f), lambda m: m.jacrev(f), lambda m: m.hessian(f)):
        for argnum in (x, vec(3).requires_grad_()):
            ours, theirs = call(func)(x, argnum), call(torch.func)(x, argnum)
            assert_same(ours, theirs)
            assert not ours.requires_grad and not theirs.requires_grad


def test_leaves_of_a_loop_are_let_go():
    """Transforms inside of a function do not keep what they were called with alive."""
    alive = []

    def f(p):
        x = p.detach()
        for _ in range(5):
            alive.append(weakref.ref(x.untyped_storage()))
            x = x - 0.1 * func.grad(lambda p, x: (p * x**2).sum(), 1)(p, x).detach()
        assert sum(reference() is not None for reference in alive) <= 2
        return (p * x).sum()

    func.grad(f)(vec(3))


@pytest.mark.parametrize("batch", [1, 4])
def test_out_dims_that_a_result_has_not(batch):
    """PyTorch's own error; also for results without the batch axis, of which PyTorch makes tensors of undefined size."""
    x = vec(batch, 3)
    both(lambda m: m.vmap(m.grad_and_value(lambda x: x.sin().sum()), out_dims=1)(x))
    for f in (lambda w, x: (w * x).sum(), lambda w, x: w.sum()):
        for argnums in (0, 1):
            with pytest.raises(IndexError, match="Dimension out of range"):
                func.vmap(func.grad_and_value(f, argnums), (None, 0), 1)(vec(3), x)


def test_above_torch_s_own_transforms():
    g = lambda x: (x**3).sum()
    for outer, inner in itertools.product(("jacrev", "jacfwd", "vmap"), ("jacrev", "grad", "hessian")):
        theirs = getattr(torch.func, inner)(g)
        assert_same(getattr(func, outer)(theirs)(vec(2, 3)), getattr(torch.func, outer)(theirs)(vec(2, 3)))


class TestBatchJacobian:
    def test_values(self):
        g = lambda x: torch.stack([x.prod(-1), (x * x[..., :1]).sum(-1)], -1)
        x = vec(4, 3)
        assert_same(wengert.batch_jacobian(g, x), torch.func.vmap(torch.func.jacrev(f))(x))
        assert wengert.batch_jacobian(lambda x: (x.sum(1), x), (x,))[1][0].shape == (4, 3, 3)
        assert wengert.batch_jacobian(lambda x, y: x.sum(1), (x, vec(4)))[1].shape == (4,)
        assert wengert.batch_jacobian(lambda x: x.sum(1), vec(0, 3)).shape == (0, 3)
        assert wengert.batch_jacobian(torch.sin, vec(4)).shape == (4,)

    def test_create_graph(self):
        x = vec(4, 3).requires_grad_()
        out = wengert.batch_jacobian(lambda x: x.prod(1), x, create_graph=True)
        assert_same(torch.autograd.grad(out.sum(), x)[0], torch.func.grad(lambda x: sum(
            torch.func.jacrev(torch.prod)(row).sum() for row in x))(x.detach()))

    @pytest.mark.parametrize(
        "g", [lambda x: x - x.mean(0), lambda x: x.flip(0), lambda x: x.T @ x @ x.T, lambda x: x.cumsum(0), lambda x: x * x.sum()]
    )
    def test_coupled_samples(self, g):
        with pytest.raises(ValueError, match=r"sample|coupl|Backward"):
            wengert.batch_jacobian(lambda x: g(x)[:3] if g(x).shape[0] != x.shape[0] else g(x), vec(3, 3))

    def test_batch_sizes_that_differ(self):
        with pytest.raises(ValueError, match="same batch size in front"):
            wengert.batch_jacobian(lambda x: x.sum(), vec(4, 3))
        with pytest.raises(ValueError, match="same batch size in front"):
            wengert.batch_jacobian(lambda x, y: x, (vec(4, 3), vec(2)))

    def test_without_the_engine(self):
        """The same answers and complaints where only PyTorch can go through the graph."""
        x = vec(4, 3)
        with torch.autograd.set_detect_anomaly(True, check_nan=False):
            assert_same(wengert.batch_jacobian(lambda x: (x**2).cumsum(1), x), torch.func.vmap(
                torch.func.jacrev(lambda x: (x**2).cumsum(0)))(x))
            with pytest.raises(ValueError, match="depends on input 0 of another sample"):
                wengert.batch_jacobian(lambda x: x - x.mean(0), x)
            with torch.device("meta"):  # a default device concerns the user's own tensors
                wengert.batch_jacobian(torch.sin, x)


def test_forward_mode_of_scattered_products_is_the_derivative():
    """torch 2.13's is zero everywhere."""
    index = torch.tensor([0, 1, 0, 2, 2])
    f = lambda x: torch.ones(3, dtype=x.dtype).scatter_reduce(0, index, x, "prod")
    assert_same(func.jacfwd(f)(vec(5)), torch.func.jacrev(f)(vec(5)))


def test_blocks_that_pytorch_computes_as_one_tensor_require_grad_together():
    p = vec(3).requires_grad_()
    cases = {
        "two outputs": lambda m: m.jacrev(lambda z: (z * p, z * 2))(vec(3)),
        "two outputs, by sample": lambda m: m.vmap(m.jacrev(lambda z: (z * p, z * 2)))(vec(2, 3)),
        "two inputs": lambda m: m.jacfwd(lambda z, w: z * p + w * 2, argnums=(0, 1))(vec(3), vec(3)),
        "hessian": lambda m: m.hessian(lambda z, w: (z * z * p + z * w + w * w).sum(), argnums=(0, 1))(vec(3), vec(3)),
    }
    for name, case in cases.items():
        both(case, name)
    zeros = torch.autograd.grad(cases["two outputs"](func)[1].sum(), p)[0]
    assert_same(zeros, torch.zeros_like(p))


def test_what_is_the_callers_comes_back_as_it_is():
    p, x = vec(3).requires_grad_(), vec(3).requires_grad_()
    f = lambda z: (z.sum(), (p, z, z * 2))
    for transform in ("grad", "jacrev"):
        with torch.no_grad():
            ours, theirs = (getattr(m, transform)(f, has_aux=True)(x)[1] for m in (func, torch.func))
        assert ours[0] is p and theirs[0] is p
        assert [t.requires_grad for t in ours] == [t.requires_grad for t in theirs]


def test_gradients_that_one_operation_computes_require_grad_each_by_itself():
    x, y, c = vec(3).requires_grad_(), vec(3), vec(3, start=2)
    cases = {
        "product": lambda m: m.grad(lambda x, y: (x * y.sin() * c).sum(), (0, 1))(x, y),
        "quotient": lambda m: m.grad(lambda x, y: (x / (y.exp() + 1)).sum(), (0, 1))(x, y),
        "hessian": lambda m: m.hessian(lambda x, y: (x * y.sin() * c).sum(), (0, 1))(x, y),
    }
    for name, case in cases.items():
        both(case, name)


def test_auxiliary_inputs_come_back_as_themselves():
    x = vec(3).requires_grad_()
    inner = lambda a: func.grad(lambda z: ((z * z * a).sum(), (z, a)), has_aux=True)(a)
    for grad_mode in (True, False):
        with torch.set_grad_enabled(grad_mode):
            assert func.grad(lambda z: (z.square().sum(), z), has_aux=True)(x)[1] is x
            assert func.grad(lambda a: (inner(a)[0].sum(), inner(a)[1]), has_aux=True)(x)[1][1] is x
