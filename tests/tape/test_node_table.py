"""docs/nodes.md says of every node of PyTorch what the tape holds for it, or why nothing but the node itself.

    python tests/tape/test_node_table.py      writes the table anew

Rows and reasons are the library's (csrc/tape/), the names of the nodes those of the header that PyTorch is installed with.
"""

from __future__ import annotations

import collections
import fnmatch
import pathlib
import re

import pytest
import torch
from wengert import _C

DOCUMENT = pathlib.Path(__file__).resolve().parents[2] / "docs" / "nodes.md"
HEADER = pathlib.Path(torch.__file__).parent / "include/torch/csrc/autograd/generated/Functions.h"
ROWS, COMPLEX_ROWS, REASONS = _C.readers()
KINDS = {
    "elementwise": "read: a factor at each element, inputs broadcast",
    "broadcast": "read: repeated along axes",
    "reduction": "read: summed over the reduced axes, with a factor",
    "view": "read: axes moved, dropped, split or sliced",
    "index": "read: at the entries of an index tensor",
    "product": "read: a matrix product",
    "scatter": "read: written into a part of the output, at an offset or at the entries of an index tensor",
    "zero": "read: the derivative is 0",
    "local": "called, batch axes tied",
    "composed": "read as the graph of what it is composed of",
    "complex": "a row for complex values only",
    "opaque": "called, or refused, as a whole",
}
is_table_of_this_version = pytest.mark.skipif(not torch.__version__.startswith("2.13."), reason="written for PyTorch 2.13")


def nodes() -> list[str]:
    return sorted(set(re.findall(r"^struct TORCH_API (\w+) : public \w+ \{", HEADER.read_text(), re.MULTILINE)))


def reason(node: str) -> str | None:
    """The first that fits."""
    return next((why for why, names in REASONS if any(fnmatch.fnmatchcase(node, name) for name in names)), None)


def kind(node: str) -> str:
    return ROWS.get(node) or ("complex" if node in COMPLEX_ROWS else "opaque")


def document() -> str:
    names = nodes()
    counts = collections.Counter(map(kind, names))
    opaque = [node for node in names if kind(node) == "opaque"]
    others = sorted((set(ROWS) | set(COMPLEX_ROWS)) - set(names))
    lines = [
        "# Nodes",
        "",
        "What the tape holds for each node of PyTorch's autograd (version 2.13), by the tables in `csrc/tape/`. Where the edges",
        "of a node differ, the kind is that of its data. `python tests/tape/test_node_table.py` writes this page.",
        "",
        f"Of {len(names)} nodes {len(names) - len(opaque)} have a row:",
        "",
        "| kind | nodes | |",
        "|---|---:|---|",
        *(f"| {one} | {counts[one]} | {meaning} |" for one, meaning in KINDS.items() if counts[one]),
        "",
        f"Rows of other nodes: {', '.join(f'`{name}` ({ROWS[name]})' for name in others)}.",
        "",
        "## Nodes with a row",
        "",
        "The last column is the kind where a value on either side is complex; without one, the node is opaque there.",
        "",
        "| node | kind | complex |",
        "|---|---|---|",
        *(f"| {node} | {ROWS.get(node, '')} | {COMPLEX_ROWS.get(node, '')} |" for node in names if node not in opaque),
        "",
        "## Opaque nodes",
        "",
        "They are called with everything they have, batched or row by row, or refused.",
        "",
    ]
    for why, _ in REASONS:
        if those := [node for node in opaque if reason(node) == why]:
            lines += [f"**{why[0].upper()}{why[1:]}** ({len(those)}): {', '.join(those)}.", ""]
    return "\n".join(lines)


@is_table_of_this_version
def test_every_node_has_a_row_or_a_reason():
    assert [node for node in nodes() if kind(node) == "opaque" and reason(node) is None] == []


def test_no_node_has_both():
    read = {node for node in [*ROWS, *COMPLEX_ROWS] if kind(node) != "opaque"}
    assert {node: reason(node) for node in read if reason(node)} == {}


@is_table_of_this_version
def test_reasons_are_those_of_nodes_that_exist():
    names = nodes()
    assert [name for _, given in REASONS for name in given if not fnmatch.filter(names, name)] == []


def test_every_name_of_what_nodes_with_a_row_save_is_known():
    """Where a node that is called saves through hooks has to be seen."""
    known = set(re.findall(r"\bf\((\w+)\)", (DOCUMENT.parents[1] / "csrc/tape/saved.h").read_text()))
    bodies = re.compile(r"^struct TORCH_API (\w+) : public \w+ \{(.*?)^\};", re.MULTILINE | re.DOTALL)
    for node, body in bodies.findall(HEADER.read_text()):
        saved = set(re.findall(r"SavedVariable>? (\w+);", body))
        assert node not in ROWS or saved <= known, (node, saved - known)


@is_table_of_this_version
def test_the_page_is_up_to_date():
    assert DOCUMENT.read_text() == document(), "python tests/tape/test_node_table.py writes it anew"


def test_the_page_says_of_rows_what_they_are():
    """Whatever the version: a node on the page that has a row here has it with that kind."""
    listed = re.findall(r"^\| (\w+) \| (\w*) \| (\w*) \|$", DOCUMENT.read_text(), re.MULTILINE)
    assert len(listed) > 300
    for node, real, of_complex in listed:
        assert ROWS.get(node, real) == real
        assert COMPLEX_ROWS.get(node, of_complex) == of_complex


if __name__ == "__main__":
    DOCUMENT.parent.mkdir(exist_ok=True)
    DOCUMENT.write_text(document())
