"""The instruction format shared by the assembler (Python) and the executor (C++).

Everything both sides must agree on is defined here once; `cpp_header` prints it as the header `encoding.h`, which the executor is
compiled with.
"""

import enum

import numpy as np


class Flag(enum.IntFlag):
    """Yes-or-no modifiers of an instruction."""

    FLUSH = 1  # .ftz: subnormal inputs and results become zero
    SATURATE = 2  # .sat
    RELU = 4  # .relu
    PROPAGATE_NAN = 8  # .NaN of min and max
    CARRY_IN = 16  # addc, subc, madc
    CARRY_OUT = 32  # .cc
    WRAP = 64  # shift amounts modulo the width, instead of clamped to it
    LEFT = 128  # shf.l instead of shf.r
    SHIFT_AMOUNT = 256  # bfind.shiftamt
    ALIGNED = 512  # all threads of a warp must wait at the same barrier instruction


class Rounding(enum.IntEnum):
    """Rounding of a result; conversions to an integer value use the same four."""

    NEAREST = 0
    ZERO = 1
    DOWN = 2
    UP = 3


class Space(enum.IntEnum):
    """State space of a memory access. Parameters are reached by addresses the assembler made, so they need no check."""

    GENERIC = 0
    GLOBAL = 1
    SHARED = 2
    LOCAL = 3
    PARAM = 4


class Compare(enum.IntEnum):
    """Comparisons; those ending in U are true for unordered operands."""

    EQ = 0
    NE = 1
    LT = 2
    LE = 3
    GT = 4
    GE = 5
    EQU = 6
    NEU = 7
    LTU = 8
    LEU = 9
    GTU = 10
    GEU = 11
    NUM = 12
    NAN = 13


class Special(enum.IntEnum):
    """Registers that every thread finds filled in when it starts; they come first in its register file."""

    SINK = 0  # takes results nobody wants
    TID_X = 1
    TID_Y = 2
    TID_Z = 3
    NTID_X = 4
    NTID_Y = 5
    NTID_Z = 6
    CTAID_X = 7
    CTAID_Y = 8
    CTAID_Z = 9
    NCTAID_X = 10
    NCTAID_Y = 11
    NCTAID_Z = 12
    LANE = 13
    WARP = 14
    WARPS = 15
    LANEMASK_EQ = 16
    LANEMASK_LT = 17
    LANEMASK_LE = 18
    LANEMASK_GT = 19
    LANEMASK_GE = 20
    PARAMETERS = 21  # address of the kernel's parameters
    LOCAL = 22  # address of the thread's local memory
    DYNAMIC_SHARED = 23  # offset of the dynamic part of shared memory
    DYNAMIC_SHARED_SIZE = 24
    TOTAL_SHARED_SIZE = 25


MAX_OPERANDS = 10

INSTRUCTION = np.dtype(
    [
        ("operation", np.int32),  # index into the executor's table of operations
        ("guard", np.int32),  # predicate register, or -1
        ("flags", np.uint32),
        ("target", np.int32),  # of a branch: an instruction; of a jump table: its first entry
        ("line", np.int32),  # of the PTX text
        ("guard_value", np.uint8),  # what the guard must hold for the instruction to execute
        ("rounding", np.uint8),
        ("space", np.uint8),
        ("mode", np.uint8),  # a Compare
        ("count", np.int32),  # elements of a vector access, entries of a jump table, bytes of a copy
        ("offset", np.int64),  # added to the address
        ("operand", np.int32, (MAX_OPERANDS,)),  # registers: result, sources
    ],
    align=True,
)

_CPP_TYPES = {"int32": "std::int32_t", "uint32": "std::uint32_t", "uint8": "std::uint8_t", "int64": "std::int64_t"}


def _cpp_name(name):
    return "k" + "".join(part.capitalize() for part in name.split("_"))


def cpp_header():
    """Returns the text of `encoding.h`."""
    lines = ["#pragma once", "#include <cstdint>", "namespace wengert::ptx {"]
    for group in (Flag, Rounding, Space, Compare, Special):
        members = ", ".join(f"{_cpp_name(member.name)} = {int(member)}" for member in group)
        lines.append(f"namespace {group.__name__.lower()} {{ enum : std::uint32_t {{ {members} }}; }}")
    lines.append(f"inline constexpr int kSpecialRegisters = {len(Special)};")
    lines.append("struct Instruction {")
    for name in INSTRUCTION.names:
        field = INSTRUCTION.fields[name][0]
        lines.append(f"  {_CPP_TYPES[field.base.name]} {name}{''.join(f'[{n}]' for n in field.shape)};")
    lines += ["};", f"static_assert(sizeof(Instruction) == {INSTRUCTION.itemsize});", "}  // namespace wengert::ptx", ""]
    return "\n".join(lines)
