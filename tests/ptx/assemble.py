"""Turns the statements of a kernel, and of the functions it calls, into the executor's instructions.

Every register of the PTX text gets a slot of its own in a thread's register file; constants lie in further slots that are
filled in when a thread starts. Functions do not recurse, so each has its registers, its local variables and its parameters at
fixed places.
"""

import dataclasses
import re
import struct

import numpy as np

from .encoding import INSTRUCTION, MAX_OPERANDS, Special
from .library import operations
from .operations import understand
from .parse import SIZES, PtxError, Unsupported, parse_variable, split_operands

_SPECIAL_NAMES = {
    **{f"%{name}.{axis}": Special[f"{name}_{axis}".upper()] for name in ("tid", "ntid", "ctaid", "nctaid") for axis in "xyz"},
    **{f"%lanemask_{side}": Special[f"LANEMASK_{side}".upper()] for side in ("eq", "lt", "le", "gt", "ge")},
    "%laneid": Special.LANE,
    "%warpid": Special.WARP,
    "%nwarpid": Special.WARPS,
    "%dynamic_smem_size": Special.DYNAMIC_SHARED_SIZE,
    "%total_smem_size": Special.TOTAL_SHARED_SIZE,
}
_CONSTANT_NAMES = {"WARP_SZ": 32, "%smid": 0, "%nsmid": 1, "%gridid": 0, "%clock_hi": 0}
_CLOCKS = {"%clock", "%clock64", "%globaltimer", "%globaltimer_lo"}
_WAITING = ("bar", "shfl", "vote", "match", "redux")
_UNINITIALISED = 2**64 - 1  # NaN in every floating-point type
_MASK = 2**64 - 1
_ONES = {"f32": 0x3F800000, "f16": 0x3C00, "bf16": 0x3F80}  # other results of `set` are all ones

_GUARD = re.compile(r"@(!?)\s*([\w$%]+)\s+(.*)$", re.S)
_OPCODE = re.compile(r"([\w.:]+)\s*(.*)$", re.S)
_DIRECTIVE = re.compile(r"\.\w+")
_REGISTERS = re.compile(r"\.reg\s*(?:\.v[24]\s*)?\.\w+\s+(.*)$", re.S)
_REGISTER_RANGE = re.compile(r"(.+)<(\d+)>$")
_ADDRESS = re.compile(r"\[\s*([\w$%.]+)\s*(?:\+\s*(-?\w+))?\s*\]$")
_SYMBOL = re.compile(r"([\w$%.]+)\s*(?:\+\s*(-?\d+))?$")
_CALL = re.compile(r"(?:\(([^)]*)\)\s*,\s*)?([\w$%]+)\s*(?:,\s*\(([^)]*)\))?\s*(?:,.*)?$", re.S)
_INTEGER = re.compile(r"-?(?:0[xX][0-9a-fA-F]+|0[bB][01]+|\d+)U?$")


def literal(text, ptx_type):
    """Returns the bits of a literal read as `ptx_type`, or None if the text is not a literal."""
    if text[:2] in ("0f", "0F") and len(text) == 10:
        if ptx_type == "f64":
            return struct.unpack("<Q", struct.pack("<d", struct.unpack("<f", struct.pack("<I", int(text[2:], 16)))[0]))[0]
        return int(text[2:], 16)
    if text[:2] in ("0d", "0D") and len(text) == 18:
        if ptx_type == "f32":
            return struct.unpack("<I", struct.pack("<f", struct.unpack("<d", struct.pack("<Q", int(text[2:], 16)))[0]))[0]
        return int(text[2:], 16)
    if not _INTEGER.match(text):
        return None
    digits = text.rstrip("U")
    octal = re.match(r"-?0\d+$", digits)
    value = int(digits, 8) if octal else int(digits, 0)
    if ptx_type == "f32":
        return struct.unpack("<I", struct.pack("<f", value))[0]
    if ptx_type == "f64":
        return struct.unpack("<Q", struct.pack("<d", value))[0]
    if ptx_type == "pred":
        return int(value != 0)
    return value & _MASK


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a variable is: an offset from what a special register holds, or from nothing."""

    base: int | None
    offset: int
    space: str


@dataclasses.dataclass
class Program:
    """A kernel ready to run.

    Attributes:
        code: array of `INSTRUCTION`.
        image: what a thread's register file holds when it starts.
        jumps: targets of all jump tables.
        unsupported: reasons by instruction, for those that stop the kernel when reached.
        parameters: (offset, size) of the kernel's parameters; `parameter_bytes` of all of them.
        waits: whether some instruction may wait for other threads.
    """

    code: np.ndarray
    image: np.ndarray
    jumps: np.ndarray
    unsupported: dict[int, str]
    parameters: list[tuple[int, int]]
    parameter_bytes: int
    local_bytes: int
    shared_bytes: int
    waits: bool


@dataclasses.dataclass
class _Frame:
    """The fixed places of a function."""

    entry: int
    return_slot: int
    parameters: list[Place]
    returns: list[Place]


class _Scope:
    """Names declared between two braces."""

    def __init__(self, parent=None):
        self.parent = parent
        self.registers = {}  # name -> slot
        self.ranges = {}  # prefix -> count of `%r<count>`
        self.places = {}
        self.labels = {}

    def chain(self):
        scope = self
        while scope is not None:
            yield scope
            scope = scope.parent


def _align(value, alignment):
    return -(-value // alignment) * alignment


class Assembler:
    """Assembles one kernel of a module.

    Args:
        source: the parsed module.
        global_address: called with the name of a module-scope variable in global or constant memory, returns where it is.
    """

    def __init__(self, source, global_address):
        self.source = source
        self.global_address = global_address
        self.operations = operations()
        self.waiting = {number for name, number in self.operations.items() if name.startswith(_WAITING)}
        self.rows = []
        self.slots = [0] * len(Special)
        self.constants = {}
        self.jumps = []
        self.unsupported = {}
        self.frames = {}
        self.assembling = []
        self.local_bytes = 0
        self.shared_bytes = 0
        self.shared_places = {}
        # Of the function and the statement at hand:
        self.scope, self.frame, self.branches, self.calls = None, None, [], []
        self.guard, self.line = (-1, 0), 0

    def assemble(self, name):
        """Returns the `Program` of the kernel `name`."""
        kernel = self.source.functions[name]
        offset, parameters, scope = 0, [], _Scope()
        for parameter in kernel.parameters:
            offset = _align(offset, parameter.align)
            parameters.append((offset, parameter.size))
            scope.places[parameter.name] = Place(Special.PARAMETERS, offset, "param")
            offset += parameter.size
        self._body(kernel, scope, None)
        code = np.zeros(len(self.rows), INSTRUCTION)
        for field in INSTRUCTION.names:
            if field != "operand":
                code[field] = [row[field] for row in self.rows]
        code["operand"] = [row["operand"] + [0] * (MAX_OPERANDS - len(row["operand"])) for row in self.rows]
        return Program(
            code,
            np.array(self.slots, np.uint64),
            np.array(self.jumps or [0], np.int32),
            self.unsupported,
            parameters,
            offset,
            _align(self.local_bytes, 16),
            self.shared_bytes,
            any(row["operation"] in self.waiting for row in self.rows),
        )

    # Slots and rows

    def _new_slot(self, value=_UNINITIALISED):
        self.slots.append(value)
        return len(self.slots) - 1

    def _constant(self, bits):
        if bits not in self.constants:
            self.constants[bits] = self._new_slot(bits)
        return self.constants[bits]

    def _emit(self, operation, operand=(), *, flags=0, rounding=0, mode=0, space=0, count=1, offset=0, target=0):
        if operation not in self.operations:
            raise Unsupported("instruction")
        self.rows.append(
            {
                "operation": self.operations[operation],
                "guard": self.guard[0],
                "guard_value": self.guard[1],
                "line": self.line,
                "operand": [int(slot) for slot in operand],
                "flags": int(flags),
                "rounding": rounding,
                "mode": mode,
                "space": space,
                "count": count,
                "offset": offset,
                "target": target,
            }
        )
        return self.rows[-1]

    def _emit_form(self, form, operand, **more):
        fields = {"flags": form.flags, "rounding": form.rounding, "mode": form.mode, "space": form.space, "count": form.count}
        return self._emit(form.operation, operand, **{**fields, **more})

    # Names

    def _register(self, name):
        for scope in self.scope.chain():
            slot = scope.registers.get(name)
            if slot is not None:
                return slot
            digits = len(name.rstrip("0123456789"))
            count = scope.ranges.get(name[:digits])
            if count is not None and name[digits:] and int(name[digits:]) < count:
                slot = scope.registers[name] = self._new_slot()
                return slot
        return None

    def _place(self, name):
        for scope in self.scope.chain():
            if name in scope.places:
                return scope.places[name]
        variable = self.source.variables.get(name)
        if variable is None:
            return None
        if isinstance(variable, PtxError):
            raise variable
        if variable.space == "shared":
            if name not in self.shared_places:
                self.shared_places[name] = self._new_shared(variable)
            return self.shared_places[name]
        return Place(None, self.global_address(name), "global")

    def _new_shared(self, variable):
        if variable.elements == 0:
            return Place(Special.DYNAMIC_SHARED, 0, "shared")
        offset = _align(self.shared_bytes, variable.align)
        self.shared_bytes = offset + variable.size
        return Place(None, offset, "shared")

    def _new_local(self, variable):
        offset = _align(self.local_bytes, max(variable.align, 8))
        self.local_bytes = offset + variable.size
        return Place(Special.LOCAL, offset, variable.space)

    def _read(self, text, ptx_type):
        """Returns the slot that holds a source operand."""
        if text[0] == "!":
            negated = self._new_slot()
            self._emit("not.pred", [negated, self._read(text[1:].strip(), "pred")])
            return negated
        slot = self._register(text)
        if slot is not None:
            return slot
        if text in _SPECIAL_NAMES:
            return _SPECIAL_NAMES[text]
        if text in _CONSTANT_NAMES:
            return self._constant(_CONSTANT_NAMES[text])
        bits = literal(text, ptx_type)
        if bits is not None:
            return self._constant(bits)
        if text in _CLOCKS:
            slot = self._new_slot()
            self._emit("clock", [slot])
            return slot
        match = _SYMBOL.match(text)
        place = self._place(match[1]) if match else None
        if place is None:
            raise Unsupported(f"operand {text}")
        offset = place.offset + int(match[2] or 0)
        if place.base is None:
            return self._constant(offset & _MASK)
        slot = self._new_slot()
        self._emit("address", [slot, place.base], offset=offset)
        return slot

    def _write(self, text):
        """Returns the slot of a result."""
        if text == "_":
            return Special.SINK
        slot = self._register(text)
        if slot is None:
            raise Unsupported(f"result {text}")
        return slot

    def _address(self, text):
        """Returns the base slot and the offset of `[name + offset]`."""
        match = _ADDRESS.match(text)
        if not match:
            raise Unsupported(f"address {text}")
        offset = int(match[2] or "0", 0)
        slot = self._register(match[1])
        if slot is not None:
            return slot, offset
        place = self._place(match[1])
        if place is not None:
            return (self._constant(0) if place.base is None else place.base), place.offset + offset
        bits = literal(match[1], "u64")
        if bits is None:
            raise Unsupported(f"address {text}")
        return self._constant(bits), offset

    # Bodies

    def _body(self, function, scope, frame):
        """Assembles a function behind what is there. `frame` is None for the kernel itself."""
        self.assembling.append(function.name)
        saved = self.scope, self.frame, self.branches, self.calls
        self.scope, self.frame, self.branches, self.calls = scope, frame, [], []
        self.guard = (-1, 0)
        label, tables = None, {}
        for statement in function.statements:
            self.line = statement.line
            if statement.kind == "open":
                self.scope = _Scope(self.scope)
            elif statement.kind == "close":
                self.scope = self.scope.parent
            elif statement.kind == "label":
                label = statement.text
                self.scope.labels[label] = len(self.rows)
            elif statement.kind == "instruction":
                self._statement(statement.text)
            elif statement.text.startswith(".branchtargets"):
                tables[label] = split_operands(statement.text[len(".branchtargets") :])
            else:
                self._declaration(statement.text)
        self.guard = (-1, 0)
        self._return()  # a body may end without a ret
        self._resolve_branches(tables)
        calls = self.calls
        self.scope, self.frame, self.branches, self.calls = saved
        for row, callee in calls:
            row["target"] = self._entry_of(callee)
        self.assembling.pop()

    def _entry_of(self, callee):
        frame = self.frames[callee]
        if frame.entry < 0:
            function = self.source.functions[callee]
            frame.entry = len(self.rows)
            scope = _Scope()
            variables = [*zip(function.returns, frame.returns), *zip(function.parameters, frame.parameters)]
            scope.places = {variable.name: place for variable, place in variables}
            self._body(function, scope, frame)
        return frame.entry

    def _resolve_branches(self, tables):
        for row, scope, target in self.branches:
            names = tables[target] if row["operation"] == self.operations["brx"] else [target]
            targets = []
            for name in names:
                found = next((s.labels[name] for s in scope.chain() if name in s.labels), None)
                if found is None:
                    raise PtxError(f"label {name} is not defined (PTX line {row['line']})")
                targets.append(found)
            if row["operation"] == self.operations["brx"]:
                row["target"], row["count"] = len(self.jumps), len(targets)
                self.jumps += targets
            else:
                row["target"] = targets[0]

    def _declaration(self, text):
        directive = _DIRECTIVE.match(text)[0]
        if directive == ".reg":
            for name in split_operands(_REGISTERS.match(text)[1]):
                if match := _REGISTER_RANGE.match(name):
                    self.scope.ranges[match[1]] = int(match[2])
                else:
                    self.scope.registers[name] = self._new_slot()
        elif directive in (".local", ".param", ".shared"):
            variable = parse_variable(text)
            place = self._new_shared(variable) if directive == ".shared" else self._new_local(variable)
            self.scope.places[variable.name] = place
        elif directive not in (".pragma", ".callprototype", ".loc", ".file"):
            raise Unsupported(f"declaration `{text}` at PTX line {self.line}")

    def _statement(self, text):
        first = len(self.rows)
        self.guard = (-1, 0)
        guard = _GUARD.match(text)
        if guard:
            self.guard = (int(self._read(guard[2], "pred")), int(guard[1] == ""))
            text = guard[3]
        opcode, rest = _OPCODE.match(text).groups()
        operands = split_operands(rest) if opcode[:4] != "call" else rest
        try:
            form = understand(opcode)
            getattr(self, "_" + form.kind)(form, operands)
        except (Unsupported, ValueError, IndexError) as error:  # the latter two: operands that do not fit the layout
            del self.rows[first:]
            self.unsupported[len(self.rows)] = f"{opcode}: {error}"
            self._emit("unsupported")

    # Layouts of operands

    def _plain(self, form, operands):
        if form.results == 2:  # "d|p" or "d"
            operands = [*(operands[0].split("|") + ["_"])[:2], *operands[1:]]
        if len(operands) != form.results + len(form.sources):
            raise Unsupported("number of operands")
        sources = [self._read(text, ptx_type) for text, ptx_type in zip(operands[form.results :], form.sources)]
        self._emit_form(form, [self._write(text.strip()) for text in operands[: form.results]] + sources)

    def _nothing(self, form, operands):
        self._emit("nothing")

    def _activemask(self, form, operands):
        self._emit_form(form, [self._write(operands[0]), Special.LANEMASK_EQ])

    def _mov(self, form, operands):
        result, source = operands
        parts = result if result[0] == "{" else source if source[0] == "{" else None
        if parts is None:
            self._plain(form, operands)
            return
        parts = split_operands(parts[1:-1])
        part_type = f"u{SIZES[form.sources[0]] * 8 // len(parts)}"
        if result[0] == "{":
            operand = [self._write(text) for text in parts] + [self._read(source, form.sources[0])]
            self._emit(f"unpack.{part_type}", operand, count=len(parts))
        else:
            operand = [self._write(result)] + [self._read(text, part_type) for text in parts]
            self._emit(f"pack.{part_type}", operand, count=len(parts))

    def _setp(self, form, operands):
        results = [text.strip() for text in operands[0].split("|")]
        if len(operands) != (4 if form.combine else 3):
            raise Unsupported("number of operands")
        slots = [self._write(text) for text in results]
        if len(slots) == 1 and not form.combine:
            self._emit_form(form, slots + [self._read(text, form.sources[0]) for text in operands[1:3]])
            return
        if len(slots) == 2 and self.guard[0] in slots:
            raise Unsupported("two predicates of which one guards the instruction")
        outcomes = [self._outcome(form, operands)]
        if len(slots) == 2:
            outcomes.append(self._new_slot())
            self._emit("not.pred", [outcomes[1], outcomes[0]])
        third = self._read(operands[3], "pred") if form.combine else None
        if third in slots:  # it must be read by both before it is written
            copy = self._new_slot()
            self._emit("mov.pred", [copy, third])
            third = copy
        for slot, outcome in zip(slots, outcomes):
            if form.combine:
                self._emit(f"{form.combine}.pred", [slot, outcome, third])
            else:
                self._emit("mov.pred", [slot, outcome])

    def _outcome(self, form, operands):
        """Emits the bare comparison of operands 1 and 2; returns the slot of its outcome."""
        outcome = self._new_slot()
        self._emit_form(form, [outcome] + [self._read(text, form.sources[0]) for text in operands[1:3]])
        return outcome

    def _setp_pair(self, form, operands):
        if form.combine or len(operands) != 3 or "|" not in operands[0]:
            raise Unsupported("packed comparison without two results")
        results = [self._write(text.strip()) for text in operands[0].split("|")]
        self._emit_form(form, results + [self._read(text, form.sources[0]) for text in operands[1:]])

    def _set(self, form, operands):
        if len(operands) != (4 if form.combine else 3):
            raise Unsupported("number of operands")
        outcome = self._outcome(form, operands)
        if form.combine:
            self._emit(f"{form.combine}.pred", [outcome, outcome, self._read(operands[3], "pred")])
        result_type = form.sources[2]
        one = self._constant(_ONES.get(result_type, _MASK))
        self._emit(f"selp.u{SIZES[result_type] * 8}", [self._write(operands[0]), one, self._constant(0), outcome])

    def _elements(self, form, text):
        elements = split_operands(text[1:-1]) if text[0] == "{" else [text]
        if len(elements) != form.count:
            raise Unsupported("number of operands")
        return elements

    def _load(self, form, operands):
        result, address = operands
        base, offset = self._address(address)
        self._emit_form(form, [self._write(text) for text in self._elements(form, result)] + [base], offset=offset)

    def _store(self, form, operands):
        address, value = operands
        base, offset = self._address(address)
        values = [self._read(text, form.sources[0]) for text in self._elements(form, value)]
        self._emit_form(form, values + [base], offset=offset)

    def _atomic(self, form, operands):
        if len(operands) != form.results + 1 + len(form.sources):
            raise Unsupported("number of operands")
        result = self._write(operands[0]) if form.results else Special.SINK
        base, offset = self._address(operands[form.results])
        sources = [self._read(text, ptx_type) for text, ptx_type in zip(operands[form.results + 1 :], form.sources)]
        self._emit_form(form, [result, base] + sources, offset=offset)

    def _barrier(self, form, operands):
        barrier, threads = [self._read(text, "u32") for text in (operands + ["0"])[:2]]
        self._emit_form(form, [Special.SINK, barrier, threads])

    def _reducing_barrier(self, form, operands):
        result, barrier, *threads, predicate = operands
        sources = [self._read(barrier, "u32"), self._read(threads[0] if threads else "0", "u32"), self._read(predicate, "pred")]
        self._emit_form(form, [self._write(result)] + sources)

    def _bra(self, form, operands):
        self.branches.append((self._emit("bra"), self.scope, operands[0]))

    def _brx(self, form, operands):
        self.branches.append((self._emit("brx", [self._read(operands[0], "u32")]), self.scope, operands[1]))

    def _ret(self, form, operands):
        self._return()

    def _exit(self, form, operands):
        self._emit("exit")

    def _return(self):
        if self.frame is None:
            self._emit("exit")
        else:
            self._emit("return", [self.frame.return_slot])

    def _call(self, form, text):
        returns, name, arguments = _CALL.match(text).groups()
        returns, arguments = split_operands(returns or ""), split_operands(arguments or "")
        places = {argument: self._place(argument) for argument in returns + arguments}
        if any(place is None or place.base != Special.LOCAL for place in places.values()):
            raise Unsupported("arguments that are not parameters")
        if name == "__assertfail":
            self._emit("assert_failed", [places[argument].offset for argument in arguments[:3]])
            return
        if name == "vprintf":
            self._emit("st.u32", [self._constant(0), Special.LOCAL], offset=places[returns[0]].offset)
            return
        function = self.source.functions.get(name)
        if function is None or function.body is None:
            raise Unsupported(f"call of {name}, which the module does not define")
        if name in self.assembling:
            raise Unsupported("recursion")
        frame = self._frame(function)
        for argument, variable, place in zip(arguments, function.parameters, frame.parameters, strict=True):
            self._copy(places[argument], place, variable)
        self.calls.append((self._emit("call", [frame.return_slot]), name))
        for argument, variable, place in zip(returns, function.returns, frame.returns, strict=True):
            self._copy(place, places[argument], variable)

    def _frame(self, function):
        if function.name not in self.frames:
            if any(variable.space != "param" for variable in function.parameters + function.returns):
                raise Unsupported("arguments in registers")
            parameters = [self._new_local(variable) for variable in function.parameters]
            returns = [self._new_local(variable) for variable in function.returns]
            self.frames[function.name] = _Frame(-1, self._new_slot(), parameters, returns)
        return self.frames[function.name]

    def _copy(self, source, target, variable):
        self._emit("copy_parameter", target=target.offset, offset=source.offset, count=variable.size)
