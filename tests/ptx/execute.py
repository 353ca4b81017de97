"""Runs a kernel's PTX on the CPU."""

import ctypes
import functools
import math
import re
import struct

import numpy as np

from .assemble import Assembler, literal
from .library import Launch, Range, Report, load
from .parse import SIZES, PtxError, Source, Unsupported, split_operands


class Module:
    """A parsed module with its variables in memory and its kernels as far as they have been used."""

    def __init__(self, text):
        self.source = Source(text)
        self.programs = {}
        self.storage = {}

    def entry(self, name):
        """Returns the full name of the entry that `name` is, or is a part of."""
        entries = self.source.entries
        found = [name] if name in entries else [entry for entry in entries if name in entry]
        if len(found) != 1:
            raise KeyError(f"{name} does not name one entry of the module, which has {entries}")
        return found[0]

    def program(self, name):
        """Returns the assembled program of an entry."""
        if name not in self.programs:
            self.programs[name] = Assembler(self.source, self.address_of).assemble(name)
        return self.programs[name]

    def address_of(self, name):
        """Returns the address of a variable in global or constant memory, allocating it at its first use."""
        if name not in self.storage:
            variable = self.source.variables[name]
            # Owned by the dictionary before its initialiser is read: two variables may point at each other.
            raw = np.zeros(max(variable.size, 1) + variable.align, np.uint8)
            start = -raw.ctypes.data % variable.align
            self.storage[name] = raw[start : start + variable.size]
            self.storage[name][:] = np.frombuffer(self._initial_bytes(variable), np.uint8)
        return self.storage[name].ctypes.data

    def _initial_bytes(self, variable):
        size = SIZES[variable.type]
        content = b""
        for element in split_operands(re.sub(r"[{}]", " ", variable.initializer or "")):
            bits = literal(element, variable.type)
            if bits is None:
                match = re.match(r"(?:generic\(\s*)?([\w$%]+)\s*\)?\s*(?:\+\s*(\d+))?$", element)
                if not match or match[1] not in self.source.variables:
                    raise Unsupported(f"initializer `{element}` of {variable.name}")
                bits = self.address_of(match[1]) + int(match[2] or 0)
            content += struct.pack("<Q", bits)[:size]
        return content.ljust(variable.size, b"\0")

    def ranges(self):
        """Returns the memory of the module's variables as ranges that kernels may touch."""
        return [
            (array.ctypes.data, array.ctypes.data + array.size, self.source.variables[name].space == "const")
            for name, array in self.storage.items()
            if array.size
        ]


@functools.lru_cache(maxsize=256)
def _module(text):
    return Module(text)


def _pointer(array):
    """Returns the address an array argument stands for, or None for a value."""
    if isinstance(array, np.ndarray):
        return array.ctypes.data
    if hasattr(array, "data_ptr"):  # a torch tensor, without importing torch
        if array.device.type != "cpu":
            raise TypeError("a tensor that the kernel works on must be on the CPU")
        return array.data_ptr()
    return None


def _range(array):
    """Returns (begin, end, read only) of an array's memory."""
    if isinstance(array, np.ndarray):
        begin, end = np.lib.array_utils.byte_bounds(array)
        return begin, end, not array.flags.writeable
    span = sum((extent - 1) * stride for extent, stride in zip(array.shape, array.stride())) + 1
    return array.data_ptr(), array.data_ptr() + span * array.element_size(), False


def _elements(array):
    return array.size if isinstance(array, np.ndarray) else array.numel()


def _pack(name, program, args):
    """Returns the bytes of a kernel's parameters."""
    if len(args) != len(program.parameters):
        raise TypeError(f"{name} takes {len(program.parameters)} arguments, {len(args)} given")
    packed = bytearray(max(program.parameter_bytes, 1))
    for i, (argument, (offset, size)) in enumerate(zip(args, program.parameters)):
        address = _pointer(argument)
        if address is not None:
            content = struct.pack("<Q", address)
        elif isinstance(argument, np.generic):
            content = argument.tobytes()
        elif isinstance(argument, (bytes, bytearray)):
            content = bytes(argument)
        else:
            kind = type(argument).__name__
            raise TypeError(f"argument {i} of {name}: give an array, a tensor, a numpy scalar or bytes, not {kind}")
        if len(content) != size:
            raise TypeError(f"argument {i} of {name} has {len(content)} bytes, its parameter {size}")
        packed[offset : offset + size] = content
    return bytes(packed)


def _extents(shape):
    shape = (shape,) if isinstance(shape, (int, np.integer)) else tuple(shape)
    if len(shape) > 3 or any(extent < 1 for extent in shape):
        raise ValueError(f"{shape} is not the shape of a grid or block")
    return (*map(int, shape), 1, 1)[:3]


def _explain(module, name, program, report):
    """Returns the text of a fault."""
    message = report.message.decode(errors="replace")
    at = report.instruction
    if at < 0:
        return f"{message} (kernel {name})"
    line = int(program.code["line"][at])
    if at in program.unsupported:
        message += f" ({program.unsupported[at]})"
    text = " ".join(module.source.lines[line - 1].split())
    return f"{message} (kernel {name}, PTX line {line} `{text}`, block {tuple(report.block)}, thread {tuple(report.thread)})"


def entries(ptx):
    """Returns the names of the kernels of a PTX module."""
    return _module(ptx).source.entries


def unsupported(ptx, kernel):
    """Returns what would stop a kernel when reached: a list of texts with PTX lines, empty if all of it can run."""
    module = _module(ptx)
    program = module.program(module.entry(kernel))
    return [f"PTX line {int(program.code['line'][at])}: {reason}" for at, reason in program.unsupported.items()]


def global_array(ptx, kernel, name, dtype):
    """Returns a `__device__` or `__constant__` variable as an array that shares its memory.

    Variables belong to the module and keep their contents from one launch to the next.
    """
    module = _module(ptx)
    module.program(module.entry(kernel))
    module.address_of(name)
    return module.storage[name].view(dtype)


def run(ptx, kernel, args, grid, block, shared_bytes=0, memory=(), check=True, order=0, seed=0):
    """Runs one launch of a kernel.

    Args:
        ptx: text of the module.
        kernel: name of an entry, or a part that only one entry has.
        args: one per parameter. A numpy array or CPU tensor is passed as a pointer, a numpy scalar by value, bytes as a struct by
            value. Sizes must match the PTX.
        grid, block: an int or up to three.
        shared_bytes: dynamic shared memory.
        memory: further arrays that the kernel may touch, because a struct among the arguments points at them.
        check: whether global accesses must lie in the arrays, be aligned and not write to read-only arrays.
        order: of the threads in a block: 0 ascending, 1 descending, 2 shuffled by `seed`.
        seed: of order 2.

    Raises:
        PtxError: for a fault, with the PTX line, the block and the thread.
    """
    module = _module(ptx)
    name = module.entry(kernel)
    program = module.program(name)
    if order not in (0, 1, 2):
        raise ValueError("order is 0, 1 or 2")
    max_threads = module.source.functions[name].max_threads
    if max_threads is not None and math.prod(_extents(block)) > max_threads:
        raise PtxError(f"{math.prod(_extents(block))} threads in a block of {name}, whose launch bounds allow {max_threads}")
    parameters = ctypes.create_string_buffer(_pack(name, program, args))
    arrays = [array for array in (*args, *memory) if _pointer(array) is not None and _elements(array)]
    touchable = [*map(_range, arrays), *module.ranges()]
    begin = ctypes.addressof(parameters)
    touchable.append((begin, begin + program.parameter_bytes, True))
    ranges = (Range * len(touchable))(*touchable)
    launch = Launch(
        code=program.code.ctypes.data,
        image=program.image.ctypes.data,
        jumps=program.jumps.ctypes.data,
        parameters=begin,
        ranges=ctypes.addressof(ranges),
        local_size=program.local_bytes,
        seed=seed,
        registers=len(program.image),
        range_count=len(ranges),
        static_shared=program.shared_bytes,
        dynamic_shared=shared_bytes,
        waits=program.waits,
        check=check,
        order=order,
        grid=_extents(grid),
        block=_extents(block),
    )
    report = Report()
    if load().ptx_launch(ctypes.byref(launch), ctypes.byref(report)):
        raise PtxError(_explain(module, name, program, report))
