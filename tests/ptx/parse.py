"""Splits the text of a PTX module into entries, functions, variables and statements, keeping line numbers.

Bodies are parsed only when asked for: a module may hold many kernels of which one is run.
"""

import bisect
import dataclasses
import functools
import math
import re

# Bytes of one element of each type. Predicates live in registers only.
SIZES = {
    **dict.fromkeys(("pred", "b8", "u8", "s8"), 1),
    **dict.fromkeys(("b16", "u16", "s16", "f16", "bf16"), 2),
    **dict.fromkeys(("b32", "u32", "s32", "f32", "f16x2", "bf16x2", "u16x2", "s16x2"), 4),
    **dict.fromkeys(("b64", "u64", "s64", "f64", "f32x2"), 8),
}


class PtxError(RuntimeError):
    """A fault of the kernel, or PTX that the executor cannot run."""


class Unsupported(PtxError):
    """PTX outside what the executor implements."""


@dataclasses.dataclass(frozen=True)
class Variable:
    """A declared variable. `elements` is 0 for `name[]`, the dynamic part of shared memory."""

    space: str
    name: str
    type: str
    elements: int
    align: int
    initializer: str | None = None

    @property
    def size(self):
        return self.elements * SIZES[self.type]


@dataclasses.dataclass(frozen=True)
class Statement:
    """One step of a body: `kind` is "open", "close", "label", "declaration" or "instruction"."""

    kind: str
    text: str
    line: int


@dataclasses.dataclass
class Function:
    """An entry or a device function; `body` is None where the module only declares it.

    `max_threads` of a block is what `__launch_bounds__` promised, or None.
    """

    name: str
    is_entry: bool
    returns: list[Variable]
    parameters: list[Variable]
    max_threads: int | None
    body: str | None
    body_line: int

    @functools.cached_property
    def statements(self):
        return _statements(self.body, self.body_line)


_COMMENT = re.compile(r'"(?:[^"\\]|\\.)*"|//[^\n]*|/\*.*?\*/', re.S)
_DIRECTIVE_LINE = re.compile(r"^[ \t]*\.(?:file|loc|version|target|address_size)\b[^\n]*", re.M)
_TOP_LEVEL = re.compile(r'"(?:[^"\\]|\\.)*"|[{};]')
_FUNCTION = re.compile(r"(?:\.(?:visible|weak|extern)\s+)*\.(entry|func)\b")
_ATTRIBUTE = re.compile(r"\.attribute\s*\([^)]*\)")
_LAUNCH_BOUNDS = re.compile(r"\.(?:maxntid|reqntid)\s+(\d+(?:\s*,\s*\d+)*)")
_PARENTHESES = re.compile(r"\(((?:[^()]|\([^()]*\))*)\)")
_VARIABLE = re.compile(
    r"(?:\.(?:visible|weak|extern|common)\s+)*\.(?P<space>global|const|shared|local|param|reg)\s*(?:\.align\s+(?P<align>\d+)\s+)?"
    r"(?:\.v(?P<vector>[24])\s+)?\.(?P<type>\w+)\s+(?:\.ptr(?:\s*\.(?:global|const|shared|local))?(?:\s*\.align\s+\d+)?\s+)?"
    r"(?P<name>[\w$%]+)\s*(?P<dimensions>(?:\[\s*\d*\s*\]\s*)*)(?:=\s*(?P<initializer>.*))?$",
    re.S,
)
# A statement: a label, a brace that opens or closes a scope, or text up to its semicolon.
_STATEMENT = re.compile(
    r"\s*(?:(?P<label>[A-Za-z_$%][\w$]*)\s*:(?!:)|(?P<brace>[{}])"
    r'|(?P<text>(?:[^;{}"]|\{[^{}]*\}|"(?:[^"\\]|\\.)*")*?);)',
    re.S,
)


def _blank(match):
    """Replaces a comment, but neither a string nor the newlines that line numbers depend on."""
    text = match[0]
    return text if text.startswith('"') else "\n" * text.count("\n") or " "


def split_operands(text):
    """Splits at the commas outside brackets."""
    if not any(bracket in text for bracket in "{[("):
        return [part.strip() for part in text.split(",")] if text.strip() else []
    parts, depth, start = [], 0, 0
    for position, character in enumerate(text):
        if character in "{[(":
            depth += 1
        elif character in "}])":
            depth -= 1
        elif character == "," and depth == 0:
            parts.append(text[start:position].strip())
            start = position + 1
    parts.append(text[start:].strip())
    return [part for part in parts if part]


def parse_variable(text):
    """Parses a declaration without its semicolon."""
    match = _VARIABLE.match(text.strip())
    if not match or match["type"] not in SIZES:
        raise Unsupported(f"declaration `{text.strip()[:120]}`")
    elements = int(match["vector"] or 1)
    for extent in re.findall(r"\[\s*(\d*)\s*\]", match["dimensions"]):
        elements *= int(extent or 0)
    natural = SIZES[match["type"]] * int(match["vector"] or 1)
    initializer = match["initializer"]
    if initializer and match["dimensions"] and "[]" in match["dimensions"].replace(" ", ""):
        elements = len(split_operands(initializer.strip().strip("{}")))
    align = int(match["align"] or natural)
    return Variable(match["space"], match["name"], match["type"], elements, align, initializer)


def _statements(body, first_line):
    statements, position, line = [], 0, first_line
    while match := _STATEMENT.match(body, position):
        token = match[0]
        kind = match.lastgroup
        line += token[: match.start(kind) - position].count("\n")
        if kind == "label":
            statements.append(Statement("label", match["label"], line))
        elif kind == "brace":
            statements.append(Statement("open" if match["brace"] == "{" else "close", "", line))
        elif text := " ".join(match["text"].split()):
            statements.append(Statement("declaration" if text[0] == "." else "instruction", text, line))
        line += body.count("\n", match.start(kind), match.end())
        position = match.end()
    if body[position:].strip():
        raise Unsupported(f"text `{body[position:].strip()[:80]}` at PTX line {line}")
    return statements


class Source:
    """The items of one PTX module.

    Attributes:
        functions: entries and device functions by name.
        variables: module-scope variables by name; a `PtxError` in place of one that cannot be parsed.
    """

    def __init__(self, text):
        self.lines = text.splitlines()
        self.functions, self.variables = {}, {}
        text = _DIRECTIVE_LINE.sub("", _COMMENT.sub(_blank, text))
        newlines = [match.start() for match in re.finditer("\n", text)]
        start, depth, opened = 0, 0, None
        for match in _TOP_LEVEL.finditer(text):
            token, position = match[0], match.start()
            if token == "{":
                opened = position if depth == 0 else opened
                depth += 1
            elif token == "}":
                depth -= 1
                head = text[start:opened].strip()
                is_body = _FUNCTION.match(head) is not None
                if depth == 0 and (is_body or head.startswith(".section")):
                    if is_body:
                        line = bisect.bisect_left(newlines, opened + 1) + 1
                        self._add_function(head, text[opened + 1 : position], line)
                    start = position + 1
            elif token == ";" and depth == 0:
                self._add_declaration(text[start:position].strip())
                start = position + 1

    def _add_function(self, head, body, line):
        head = _ATTRIBUTE.sub("", head)
        kind = _FUNCTION.match(head)
        rest = head[kind.end() :].strip()
        returns = ""
        if rest.startswith("("):
            match = _PARENTHESES.match(rest)
            returns, rest = match[1], rest[match.end() :].strip()
        name = re.match(r"[\w$%]+", rest)[0]
        if body is None and name in self.functions:
            return
        parameters = _PARENTHESES.match(rest[len(name) :].strip())
        bounds = _LAUNCH_BOUNDS.search(rest)
        self.functions[name] = Function(
            name,
            kind[1] == "entry",
            [parse_variable(text) for text in split_operands(returns)],
            [parse_variable(text) for text in split_operands(parameters[1] if parameters else "")],
            math.prod(int(extent) for extent in bounds[1].split(",")) if bounds else None,
            body,
            line,
        )

    def _add_declaration(self, text):
        if _FUNCTION.match(text):
            self._add_function(text, None, 0)
        elif text and not text.startswith((".alias", ".pragma")):
            try:
                variable = parse_variable(text)
                self.variables[variable.name] = variable
            except Unsupported as error:
                name = re.search(r"([\w$%]+)\s*(?:\[[^\]]*\]\s*)*(?:=|$)", text)
                self.variables[name[1] if name else text] = error

    @property
    def entries(self):
        return [function.name for function in self.functions.values() if function.is_entry and function.body is not None]
