"""Budgets: the size of functions and files, and the number of positional parameters.

A function is as long as the lines of its body that carry code: its signature, its docstring, blank
lines and lines with only a comment do not count; a nested function counts in the outer one, too.
A file is as long as it is: `wc -l`.
"""

from __future__ import annotations

import ast
import io
import tokenize
from statistics import median

import pytest

from tests.architecture.source import Function, Source, dotted, findings, read_package

MEDIAN_LINES = 8
FUNCTION_LINES = 60
KERNEL_LINES = 80
FILE_LINES = 400
FACADES = ("crossdock/buffer.py", "crossdock/decoding.py")
FACADE_LINES = {"crossdock/buffer.py": 600}
POSITIONAL = 3

DEEPEP_METHODS = {
    "get_buffer_size_hint", "get_combine_config", "get_dispatch_config", "get_dispatch_layout",
    "get_local_buffer_tensor", "capture", "combine", "dispatch", "set_num_sms",
    "internode_combine", "internode_dispatch", "low_latency_combine", "low_latency_dispatch",
    "clean_low_latency_buffer", "get_low_latency_rdma_size_hint",
    "get_next_low_latency_combine_buffer",
}  # fmt: skip
"""Of `Buffer`: their parameters are DeepEP's."""

NO_CODE = {
    tokenize.COMMENT, tokenize.DEDENT, tokenize.ENDMARKER, tokenize.INDENT, tokenize.NEWLINE,
    tokenize.NL,
}  # fmt: skip


def function_sizes(source: Source) -> dict[Function, int]:
    coded = _code_lines(source.text)
    return {function: _body_size(function, coded) for function, _ in source.functions()}


def find_long_functions(source: Source) -> list[str]:
    cap = KERNEL_LINES if source.is_kernel else FUNCTION_LINES
    return [
        source.at(function, f"{function.name} has {size} lines of code, the cap is {cap}")
        for function, size in function_sizes(source).items()
        if size > cap
    ]


def find_long_files(source: Source) -> list[str]:
    if source.is_kernel:
        return []
    cap, size = FACADE_LINES.get(source.path, FILE_LINES), len(source.text.splitlines())
    return [f"{source.path}: {size} lines, the cap is {cap}"] if size > cap else []


def find_many_positional(source: Source) -> list[str]:
    found = []
    for function, parent in source.functions():
        count = _num_positional(function, parent)
        if count > POSITIONAL and not _has_foreign_signature(source, function, parent):
            found.append(source.at(function, f"{function.name} has {count} positional parameters"))
    return found


def _code_lines(text: str) -> set[int]:
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in NO_CODE:
            lines.update(range(token.start[0], token.end[0] + 1))
    return lines


def _body_size(function: Function, coded: set[int]) -> int:
    has_docstring = ast.get_docstring(function, clean=False) is not None
    body = function.body[1:] if has_docstring else function.body
    if not body:
        return 0
    decorators = getattr(body[0], "decorator_list", [])
    first = min(node.lineno for node in [body[0], *decorators])
    return sum(first <= line <= function.end_lineno for line in coded)


def _num_positional(function: Function, parent: ast.AST) -> int:
    count = len(function.args.posonlyargs) + len(function.args.args)
    is_static = "staticmethod" in map(dotted, function.decorator_list)
    return count - (isinstance(parent, ast.ClassDef) and not is_static)


def _has_foreign_signature(source: Source, function: Function, parent: ast.AST) -> bool:
    """Whether somebody else decides how it is called: Python, DeepEP, or a kernel's launcher."""
    if function.name.startswith("__") and function.name.endswith("__"):
        return True
    if source.path in FACADES and isinstance(parent, ast.ClassDef):
        return function.name in DEEPEP_METHODS
    decorators = [
        node.func if isinstance(node, ast.Call) else node for node in function.decorator_list
    ]
    return source.is_kernel and any(dotted(node).endswith("jit") for node in decorators)


CHECKS = [find_long_functions, find_long_files, find_many_positional]


@pytest.mark.parametrize("check", CHECKS)
def test_budgets_are_kept(check):
    report = findings(read_package(), check)
    assert not report, report


def test_functions_are_short_on_the_whole():
    sizes = [size for source in read_package() for size in function_sizes(source).values()]
    assert median(sizes) <= MEDIAN_LINES


def _long(num_lines: int) -> str:
    return "def f():\n" + "    x = 1\n" * num_lines


@pytest.mark.parametrize(
    ("path", "check", "text"),
    [
        ("crossdock/bad.py", find_long_functions, _long(61)),
        ("crossdock/ops/triton/bad.py", find_long_functions, _long(81)),
        ("crossdock/bad.py", find_long_files, "\n" * 401),
        ("crossdock/buffer.py", find_long_files, "\n" * 601),
        ("crossdock/bad.py", find_many_positional, "def f(a, b, c, d): ..."),
        ("crossdock/bad.py", find_many_positional, "class A:\n    def f(self, a, b, c, d): ..."),
        ("crossdock/bad.py", find_many_positional, "def f():\n    def g(a, b, /, c, d=1): ..."),
        (
            "crossdock/buffer.py",
            find_many_positional,
            "class Buffer:\n    def g(self, a, b, c, d): ...",
        ),
        (
            "crossdock/bad.py",
            find_many_positional,
            "class A:\n    @staticmethod\n    def f(a, b, c, d): ...",
        ),
    ],
)
def test_too_much_would_be_found(path, check, text):
    assert findings([Source(path, text)], check).startswith(path)


@pytest.mark.parametrize(
    ("path", "check", "text"),
    [
        ("crossdock/good.py", find_long_functions, _long(60)),
        ("crossdock/ops/triton/good.py", find_long_functions, _long(80)),
        (
            "crossdock/good.py",
            find_many_positional,
            "class A:\n    def f(self, a, b, c, *, d): ...",
        ),
        (
            "crossdock/good.py",
            find_many_positional,
            "class A:\n    def __exit__(self, a, b, c, d): ...",
        ),
        (
            "crossdock/buffer.py",
            find_many_positional,
            "class Buffer:\n    def dispatch(s, a, b, c, d): ...",
        ),
    ],
)
def test_what_is_allowed_passes(path, check, text):
    assert findings([Source(path, text)], check) == ""


def test_only_code_counts():
    text = '''
def f(
    a,
    b,
):
    """Says what it does.

    At length.
    """
    # A comment.

    @wrap
    def g():
        return [
            a,
        ]
    return g  # the end
'''
    source = Source("crossdock/good.py", text)
    sizes = {function.name: size for function, size in function_sizes(source).items()}
    assert sizes == {"f": 6, "g": 3}
