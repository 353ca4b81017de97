"""What each PTX opcode means: which operation of the executor it is, with which modifiers and operand types.

A rule accepts exactly the modifiers it implements. Everything else is `Unsupported`, so that no modifier is ever silently
dropped.
"""

import dataclasses
import functools

from .encoding import Compare, Flag, Rounding, Space
from .parse import SIZES, Unsupported


@dataclasses.dataclass(frozen=True)
class Form:
    """An opcode, understood.

    Attributes:
        operation: name in the executor's table.
        sources: types of the source operands, or of the elements of a vector access.
        results: number of results, which come before the sources.
        kind: how the assembler lays the operands out: "plain" (results, then sources) or one of its special layouts.
        combine: logical operation that joins a comparison with a third operand.
    """

    operation: str
    sources: tuple[str, ...] = ()
    results: int = 1
    kind: str = "plain"
    flags: int = 0
    rounding: int = 0
    mode: int = 0
    space: int = 0
    count: int = 1
    combine: str | None = None


_FLAGS = {
    "ftz": Flag.FLUSH,
    "sat": Flag.SATURATE,
    "relu": Flag.RELU,
    "NaN": Flag.PROPAGATE_NAN,
    "cc": Flag.CARRY_OUT,
    "wrap": Flag.WRAP,
    "clamp": 0,
    "l": Flag.LEFT,
    "r": 0,
    "shiftamt": Flag.SHIFT_AMOUNT,
    # All .approx forms are computed accurately.
    "approx": 0,
    "full": 0,
}
_ROUNDINGS = {"rn": Rounding.NEAREST, "rz": Rounding.ZERO, "rm": Rounding.DOWN, "rp": Rounding.UP}
_INTEGER_ROUNDINGS = {name + "i": mode for name, mode in _ROUNDINGS.items()}
_SPACES = {"global": Space.GLOBAL, "const": Space.GLOBAL, "shared": Space.SHARED, "local": Space.LOCAL, "param": Space.PARAM}
_COMPARISONS = {member.name.lower(): member for member in Compare}
_UNSIGNED_COMPARISONS = {"lo": Compare.LT, "ls": Compare.LE, "hi": Compare.GT, "hs": Compare.GE}
_FLOATS = {"f16", "bf16", "f32", "f64", "f16x2", "bf16x2", "f32x2"}
# Threads take turns and memory is coherent, so ordering and caching change nothing.
_ORDERING = set("weak volatile relaxed acquire release acq_rel sc cta cluster gpu sys mmio".split())
_CACHING = set("nc ca cg cs lu cv wb wt unified".split())

_RULES = {}


def _rule(*names):
    def register(function):
        _RULES.update(dict.fromkeys(names, function))
        return function

    return register


def bits_of(ptx_type):
    """Returns the unsigned type of the same size; predicates stay."""
    return ptx_type if ptx_type == "pred" else f"u{SIZES[ptx_type] * 8}"


def _split_types(modifiers):
    return [m for m in modifiers if m not in SIZES], [m for m in modifiers if m in SIZES]


def _only_type(modifiers):
    rest, types = _split_types(modifiers)
    if len(types) != 1:
        raise Unsupported("operand types")
    return rest, types[0]


def _options(modifiers, allowed):
    """Returns flags and rounding of modifiers that must all be among the allowed ones."""
    flags, rounding = 0, Rounding.NEAREST
    for modifier in modifiers:
        if modifier not in allowed:
            raise Unsupported(f"modifier .{modifier}")
        if modifier in _FLAGS:
            flags |= _FLAGS[modifier]
        else:
            rounding = {**_ROUNDINGS, **_INTEGER_ROUNDINGS}[modifier]
    return {"flags": int(flags), "rounding": int(rounding)}


_ARITHMETIC = {"rn", "rz", "rm", "rp", "ftz", "sat"}


def _float(name, arity, modifiers, allowed):
    rest, ptx_type = _only_type(modifiers)
    return Form(f"{name}.{ptx_type}", (ptx_type,) * arity, **_options(rest, allowed))


@_rule("add", "sub")
def _sum(name, modifiers):
    rest, ptx_type = _only_type(modifiers)
    if ptx_type in _FLOATS:
        return _float(name, 2, modifiers, _ARITHMETIC)
    if rest == ["sat"] and ptx_type == "s32":
        return Form(f"{name}.sat.s32", ("s32",) * 2)
    operation = f"{name}.carry" if "cc" in rest else name
    return Form(f"{operation}.{bits_of(ptx_type)}", (bits_of(ptx_type),) * 2, **_options(rest, {"cc"}))


@_rule("addc", "subc")
def _carry_sum(name, modifiers):
    rest, ptx_type = _only_type(modifiers)
    form = Form(f"{name[:3]}.carry.{bits_of(ptx_type)}", (bits_of(ptx_type),) * 2, **_options(rest, {"cc"}))
    return dataclasses.replace(form, flags=form.flags | Flag.CARRY_IN)


@_rule("mul", "mad", "madc", "mul24", "mad24")
def _product(name, modifiers):
    rest, ptx_type = _only_type(modifiers)
    if ptx_type in _FLOATS:
        return _float("mul" if name == "mul" else "fma", 2 if name == "mul" else 3, modifiers, _ARITHMETIC)
    if not rest or rest[0] not in ("lo", "hi", "wide"):
        raise Unsupported("product without .lo, .hi or .wide")
    part, rest = rest[0], rest[1:]
    if part == "lo" and not name.endswith("24"):
        ptx_type = bits_of(ptx_type)
    carries = name == "madc" or "cc" in rest
    options = _options(rest, {"cc"})
    options["flags"] |= Flag.CARRY_IN if name == "madc" else 0
    sources = [ptx_type] * (2 if name.startswith("mul") else 3)
    if part == "wide" and len(sources) == 3:
        sources[2] = f"{ptx_type[0]}{SIZES[ptx_type] * 16}"
    stem = "mad" if name == "madc" else name
    return Form(f"{stem}.{part}{'.carry' if carries else ''}.{ptx_type}", tuple(sources), **options)


@_rule("fma")
def _fma(name, modifiers):
    return _float(name, 3, modifiers, _ARITHMETIC | {"relu"})


@_rule("div", "rem")
def _quotient(name, modifiers):
    return _float(name, 2, modifiers, {"approx", "full", "rn", "rz", "rm", "rp", "ftz"} if modifiers[-1] in _FLOATS else ())


@_rule("rcp", "sqrt", "rsqrt", "ex2", "lg2", "sin", "cos", "tanh")
def _approximation(name, modifiers):
    return _float(name, 1, modifiers, {"approx", "rn", "rz", "rm", "rp", "ftz"})


@_rule("neg", "abs")
def _sign(name, modifiers):
    return _float(name, 1, modifiers, {"ftz"})


@_rule("min", "max")
def _extremum(name, modifiers):
    return _float(name, 2, modifiers, {"ftz", "NaN"} if modifiers[-1] in _FLOATS else ())


@_rule("copysign")
def _copysign(name, modifiers):
    return _float(name, 2, modifiers, ())


@_rule("testp")
def _testp(name, modifiers):
    return Form(f"testp.{modifiers[0]}.{modifiers[-1]}", (modifiers[-1],))


@_rule("sad")
def _sad(name, modifiers):
    return _float(name, 3, modifiers, ())


@_rule("and", "or", "xor")
def _logic(name, modifiers):
    rest, ptx_type = _only_type(modifiers)
    return Form(f"{name}.{bits_of(ptx_type)}", (ptx_type,) * 2, **_options(rest, ()))


@_rule("not", "cnot", "clz", "popc", "brev")
def _bits(name, modifiers):
    rest, ptx_type = _only_type(modifiers)
    return Form(f"{name}.{bits_of(ptx_type)}", (ptx_type,), **_options(rest, ()))


@_rule("bfind")
def _bfind(name, modifiers):
    return _float(name, 1, modifiers, {"shiftamt"})


@_rule("shl", "shr")
def _shift(name, modifiers):
    rest, ptx_type = _only_type(modifiers)
    operand = ptx_type if ptx_type[0] == "s" and name == "shr" else bits_of(ptx_type)
    return Form(f"{name}.{operand}", (operand, "u32"), **_options(rest, ()))


@_rule("shf")
def _funnel(name, modifiers):
    rest, _ = _only_type(modifiers)
    return Form("shf.u32", ("u32",) * 3, **_options(rest, {"l", "r", "wrap", "clamp"}))


@_rule("bfe", "bfi")
def _bit_field(name, modifiers):
    rest, ptx_type = _only_type(modifiers)
    operand = bits_of(ptx_type) if ptx_type[0] == "b" else ptx_type
    return Form(f"{name}.{operand}", ((operand,) if name == "bfe" else (operand,) * 2) + ("u32", "u32"), **_options(rest, ()))


@_rule("prmt", "lop3")
def _bytes(name, modifiers):
    rest, _ = _only_type(modifiers)
    return Form(f"{name}.u32", ("u32",) * (3 if name == "prmt" else 4), **_options(rest, ()))


@_rule("bmsk", "szext")
def _mask(name, modifiers):
    rest, ptx_type = _only_type(modifiers)
    operand = bits_of(ptx_type) if ptx_type[0] == "b" else ptx_type
    return Form(f"{name}.{operand}", (operand, "u32"), **_options(rest, {"wrap", "clamp"}))


@_rule("dp4a")
def _dot(name, modifiers):
    return Form(f"dp4a.{modifiers[0]}.{modifiers[1]}", ("u32",) * 3)


@_rule("selp")
def _selp(name, modifiers):
    rest, ptx_type = _only_type(modifiers)
    return Form(f"selp.{bits_of(ptx_type)}", (ptx_type, ptx_type, "pred"), **_options(rest, ()))


@_rule("slct")
def _slct(name, modifiers):
    rest, (value, sign) = _split_types(modifiers)
    return Form(f"slct.{sign}.{bits_of(value)}", (value, value, sign), **_options(rest, {"ftz"}))


def _comparison(modifiers, ptx_type):
    """Returns the operand type, the mode, the combining operation and the remaining modifiers of setp and set."""
    comparison, rest = modifiers[0], modifiers[1:]
    combine = next((m for m in rest if m in ("and", "or", "xor")), None)
    rest = [m for m in rest if m != combine]
    if comparison in _UNSIGNED_COMPARISONS:
        return bits_of(ptx_type), _UNSIGNED_COMPARISONS[comparison], combine, rest
    if comparison not in _COMPARISONS:
        raise Unsupported(f"comparison .{comparison}")
    operand = bits_of(ptx_type) if ptx_type[0] == "b" and ptx_type not in _FLOATS else ptx_type
    return operand, _COMPARISONS[comparison], combine, rest


@_rule("setp")
def _setp(name, modifiers):
    rest, ptx_type = _only_type(modifiers)
    operand, mode, combine, rest = _comparison(rest, ptx_type)
    kind = "setp_pair" if operand in ("f16x2", "bf16x2") else "setp"
    return Form(f"setp.{operand}", (operand,) * 2, kind=kind, mode=int(mode), combine=combine, **_options(rest, {"ftz"}))


@_rule("set")
def _set(name, modifiers):
    rest, types = _split_types(modifiers)
    if len(types) != 2:
        raise Unsupported("operand types")
    operand, mode, combine, rest = _comparison(rest, types[1])
    options = {"mode": int(mode), **_options(rest, {"ftz"})}
    if operand in ("f16x2", "bf16x2"):
        if combine or types[0] not in (operand, "u32", "s32"):
            raise Unsupported("packed set to another type")
        return Form(f"set.{operand if types[0] == operand else 'mask.' + operand}", (operand,) * 2, **options)
    # The last source names the type of the result: the assembler needs its one.
    return Form(f"setp.{operand}", (operand, operand, types[0]), kind="set", combine=combine, **options)


@_rule("mov")
def _mov(name, modifiers):
    rest, ptx_type = _only_type(modifiers)
    return Form(f"mov.{bits_of(ptx_type)}", (ptx_type,), kind="mov", **_options(rest, ()))


@_rule("cvt")
def _cvt(name, modifiers):
    rest, types = _split_types(modifiers)
    if len(types) != 2:
        raise Unsupported("operand types")
    result, source = types
    if result in ("f16x2", "bf16x2"):
        return Form(f"cvt.{result}.{source}", (source,) * 2, **_options(rest, {"rn", "rz", "relu", "ftz"}))
    integral = any(m in _INTEGER_ROUNDINGS for m in rest)
    options = _options(rest, {"ftz", "sat", "relu", *_ROUNDINGS, *_INTEGER_ROUNDINGS})
    to_integral_float = integral and result in _FLOATS
    if not integral and result not in _FLOATS and source in _FLOATS:
        raise Unsupported("conversion to an integer without rounding")
    return Form(f"cvt{'.integral' if to_integral_float else ''}.{result}.{source}", (source,), **options)


def _space(modifiers):
    """Returns the state space among the modifiers and those that remain."""
    found = [m for m in modifiers if m.split("::")[0] in _SPACES]
    if any(m.endswith("::cluster") for m in found):
        raise Unsupported("cluster memory")
    space = _SPACES[found[0].split("::")[0]] if found else Space.GENERIC
    return int(space), [m for m in modifiers if m not in found]


@_rule("ld", "ldu", "st")
def _access(name, modifiers):
    rest, ptx_type = _only_type(modifiers)
    space, rest = _space(rest)
    count = 1
    for modifier in rest:
        if modifier in ("v2", "v4", "v8"):
            count = int(modifier[1])
        elif modifier == "L2::cache_hint" or not (modifier in _ORDERING | _CACHING or modifier.startswith(("L1::", "L2::"))):
            raise Unsupported(f"modifier .{modifier}")
    element = bits_of(ptx_type) if ptx_type[0] in "bf" or name == "st" else ptx_type
    kind = "store" if name == "st" else "load"
    return Form(f"{name[:2]}.{element}", (ptx_type,) * count, count, kind=kind, space=space, count=count)


@_rule("atom", "red")
def _atomic(name, modifiers):
    rest, ptx_type = _only_type(modifiers)
    space, rest = _space(rest)
    rest = [m for m in rest if m not in _ORDERING and m != "noftz"]
    if len(rest) != 1:
        raise Unsupported("modifiers ." + ".".join(rest))
    operation = rest[0]
    operand = ptx_type if ptx_type in _FLOATS or operation in ("min", "max") else bits_of(ptx_type)
    sources = (operand,) * (2 if operation == "cas" else 1)
    return Form(f"atom.{operation}.{operand}", sources, 1 if name == "atom" else 0, kind="atomic", space=space)


@_rule("cvta")
def _cvta(name, modifiers):
    rest, ptx_type = _only_type(modifiers)
    space, rest = _space(rest)
    if rest not in ([], ["to"]):
        raise Unsupported("modifiers ." + ".".join(rest))
    if space == Space.SHARED:
        return Form("generic_to_shared" if rest else "shared_to_generic", (ptx_type,))
    return Form("mov.u64", ("u64",))


@_rule("isspacep")
def _isspacep(name, modifiers):
    space, rest = _space(modifiers)
    if rest or "const" in modifiers or space not in (Space.GLOBAL, Space.SHARED, Space.LOCAL):
        raise Unsupported("space")
    return Form("is_in_space", ("u64",), space=space)


def _require_sync(modifiers):
    if "sync" not in modifiers:
        raise Unsupported("warp operation without .sync")
    return [m for m in modifiers if m != "sync"]


@_rule("shfl")
def _shfl(name, modifiers):
    (mode,), _ = _split_types(_require_sync(modifiers))
    return Form(f"shfl.{mode}", ("u32",) * 4, 2)


@_rule("vote")
def _vote(name, modifiers):
    (mode,), _ = _split_types(_require_sync(modifiers))
    return Form(f"vote.{mode}", ("pred", "u32"))


@_rule("match")
def _match(name, modifiers):
    (mode,), (ptx_type,) = _split_types(_require_sync(modifiers))
    return Form(f"match.{mode}.{bits_of(ptx_type)}", (ptx_type, "u32"), 2)


@_rule("redux")
def _redux(name, modifiers):
    (operation,), (ptx_type,) = _split_types(_require_sync(modifiers))
    operand = bits_of(ptx_type) if ptx_type[0] == "b" else ptx_type
    return Form(f"redux.{operation}.{operand}", (operand, "u32"))


@_rule("activemask")
def _activemask(name, modifiers):
    # Legal and pessimistic: each lane finds itself alone.
    return Form("mov.u32", ("u32",), kind="activemask")


@_rule("bar", "barrier")
def _barrier(name, modifiers):
    rest, _ = _split_types(modifiers)
    if rest == ["warp", "sync"]:
        return Form("bar.warp", ("u32",), 0)
    flags = int(Flag.ALIGNED) if name == "bar" or "aligned" in rest else 0
    rest = [m for m in rest if m not in ("cta", "aligned")]
    if rest == ["sync"]:
        return Form("bar.sync", kind="barrier", flags=flags)
    if len(rest) == 2 and rest[0] == "red":
        return Form(f"bar.red.{rest[1]}", kind="reducing_barrier", flags=flags)
    raise Unsupported("barrier")


@_rule("membar", "fence", "prefetch", "prefetchu", "nanosleep", "discard", "applypriority", "pmevent", "brkpt", "griddepcontrol")
def _nothing(name, modifiers):
    return Form("nothing", kind="nothing")


@_rule("trap")
def _trap(name, modifiers):
    return Form("trap", (), 0)


@_rule("bra", "brx", "call", "ret", "exit")
def _control(name, modifiers):
    return Form(name, kind=name)


@functools.cache
def understand(opcode):
    """Returns the `Form` of an opcode with its modifiers, such as "add.rn.f32".

    Raises:
        Unsupported: for an unknown opcode, modifier or combination of types.
    """
    name, *modifiers = opcode.split(".")
    if name not in _RULES:
        raise Unsupported("instruction")
    try:
        return _RULES[name](name, modifiers)
    except (ValueError, IndexError) as error:
        raise Unsupported("modifiers") from error
