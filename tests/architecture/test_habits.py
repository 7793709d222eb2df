"""What the code does not do: assert, share state, reach into torch, look at what may change."""

from __future__ import annotations

import ast
from collections.abc import Iterator

import pytest

from tests.architecture.source import Source, dotted, findings, read_everything

MUTABLE = {
    "bytearray", "count", "cycle", "defaultdict", "deque", "dict", "list", "local", "set",
    "BoundedSemaphore", "Condition", "Counter", "ContextVar", "Event", "Lock", "OrderedDict",
    "Queue", "RLock", "Semaphore", "SimpleNamespace", "SimpleQueue", "WeakKeyDictionary",
    "WeakSet", "WeakValueDictionary",
}  # fmt: skip
"""Constructors of what can be changed in place, by the last part of their name."""

ALLOWED_STATE = {("crossdock/autograd.py", "WeakValueDictionary")}
"""Library operations take tensors and numbers, no Buffer: one weak registry finds it again."""

PRIVATE_TORCH = {"crossdock/transports/heap_cuda.py"}
"""Symmetric memory has no public name yet; the file says which versions it was written for."""

LOOKING = {f"crossdock/ops/triton/{name}.py" for name in ("masked", "sync")}
"""Where warps that see different values come to agree. See `links.alike`."""


def find_asserts(source: Source) -> list[str]:
    nodes = (node for node in ast.walk(source.tree) if isinstance(node, ast.Assert))
    return [source.at(node, "assert: raise an error that says what to do") for node in nodes]


def find_globals(source: Source) -> list[str]:
    nodes = (node for node in ast.walk(source.tree) if isinstance(node, ast.Global))
    return [source.at(node, f"global {', '.join(node.names)}") for node in nodes]


def find_module_state(source: Source) -> list[str]:
    """Mutable values held by a module or a class, where every user of the package shares them."""
    found = []
    for name, value in _shared_values(source.tree.body):
        kind = _mutable_kind(value)
        if kind and name != "__all__" and (source.path, kind) not in ALLOWED_STATE:
            found.append(source.at(value, f"{name} is a {kind} that all users share"))
    return found


def find_private_torch(source: Source) -> list[str]:
    if source.path in PRIVATE_TORCH:
        return []
    names = _torch_aliases(source.tree)
    uses = [
        (node, name)
        for node in ast.walk(source.tree)
        for name in _torch_names(node, names)
        if any(part.startswith("_") and not part.endswith("__") for part in name.split("."))
    ]
    return [source.at(node, f"{name} is private to torch") for node, name in uses]


def find_looks(source: Source) -> list[str]:
    """Loads of what others may be writing: each warp has its own, and branches must not part."""
    if source.path in LOOKING:
        return []
    nodes = (node for node in ast.walk(source.tree) if isinstance(node, ast.Call))
    return [
        source.at(node, "volatile: warps may see different values, use links.look_alike")
        for node in nodes
        if any(keyword.arg == "volatile" for keyword in node.keywords)
    ]


def _shared_values(body: list[ast.stmt]) -> Iterator[tuple[str, ast.expr]]:
    for statement in body:
        if isinstance(statement, ast.ClassDef):
            yield from _shared_values(statement.body)
        elif isinstance(statement, ast.Assign):
            yield from ((ast.unparse(target), statement.value) for target in statement.targets)
        elif isinstance(statement, ast.AnnAssign) and statement.value is not None:
            yield ast.unparse(statement.target), statement.value


def _mutable_kind(value: ast.expr) -> str:
    if isinstance(value, ast.List | ast.ListComp):
        return "list"
    if isinstance(value, ast.Dict | ast.DictComp):
        return "dict"
    if isinstance(value, ast.Set | ast.SetComp):
        return "set"
    if not isinstance(value, ast.Call):
        return ""
    made = value.func.value if isinstance(value.func, ast.Subscript) else value.func
    constructor = dotted(made).rpartition(".")[2]
    return constructor if constructor in MUTABLE else ""


def _torch_aliases(tree: ast.Module) -> dict[str, str]:
    """Local name -> what it stands for, of everything that is imported from torch."""
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                whole = alias.name if alias.asname else alias.name.partition(".")[0]
                names[alias.asname or whole] = whole
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                names[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    return {name: whole for name, whole in names.items() if _is_torch(whole)}


def _torch_names(node: ast.AST, aliases: dict[str, str]) -> list[str]:
    """The full names in torch that a node imports, spells out or asks for by `getattr`."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names if _is_torch(alias.name)]
    if isinstance(node, ast.ImportFrom):
        names = [f"{node.module}.{alias.name}" for alias in node.names]
        return [name for name in names if _is_torch(name)]
    if isinstance(node, ast.Attribute):
        first, _, rest = dotted(node).partition(".")
        return [f"{aliases[first]}.{rest}"] if first in aliases else []
    match node:
        case ast.Call(
            func=ast.Name("getattr" | "hasattr"), args=[owner, ast.Constant(str(name)), *_]
        ):
            first, dot, rest = dotted(owner).partition(".")
            return [f"{aliases[first]}{dot}{rest}.{name}"] if first in aliases else []
    return []


def _is_torch(name: str) -> bool:
    return name.partition(".")[0] == "torch"


CHECKS = [find_asserts, find_globals, find_module_state, find_private_torch, find_looks]


@pytest.mark.parametrize("check", CHECKS)
def test_the_code_is_free_of_it(check):
    report = findings(read_everything(), check)
    assert not report, report


@pytest.mark.parametrize(
    ("check", "text"),
    [
        (find_asserts, "def f(x):\n    assert x > 0"),
        (
            find_asserts,
            "class A:\n    def f(self):\n        if self:\n            assert False, 'no'",
        ),
        (find_globals, "n = 0\ndef f():\n    global n\n    n += 1"),
        (find_module_state, "_cache = {}"),
        (find_module_state, "_cache: dict[int, int] = dict()"),
        (find_module_state, "_seen = [n for n in range(3)]"),
        (find_module_state, "_seen = {1, 2}"),
        (find_module_state, "import weakref\n_buffers = weakref.WeakValueDictionary()"),
        (find_module_state, "_numbers = itertools.count()"),
        (find_module_state, "_names = defaultdict[str, int](int)"),
        (find_module_state, "class Buffer:\n    made = []"),
        (find_private_torch, "import torch\ntorch._C._get_tracing_state()"),
        (find_private_torch, "import torch.distributed as dist\ndist._symmetric_memory.empty(1)"),
        (find_private_torch, "from torch import distributed\ndistributed._get_default_group()"),
        (find_private_torch, "from torch.distributed import _symmetric_memory"),
        (find_private_torch, "import torch._dynamo"),
        (find_private_torch, "def f():\n    from torch._inductor import config"),
        (find_private_torch, "import torch\ngetattr(torch, '_C')"),
        (find_looks, "def f(p):\n    if tl.load(p, volatile=True):\n        tl.debug_barrier()"),
    ],
)
def test_it_would_be_found(check, text):
    assert findings([Source("crossdock/bad.py", text)], check).startswith("crossdock/bad.py:")


@pytest.mark.parametrize(
    ("check", "text"),
    [
        (find_module_state, "__all__ = ['f']\nCASES = MappingProxyType({'a': 1})\nN = (1, 2)"),
        (find_module_state, "def f():\n    seen = []\n    return seen"),
        (find_private_torch, "import torch\ntorch.__version__\ntorch.nn.functional.silu"),
        (find_private_torch, "from crossdock import _env\n_env.timeout_s()\nself._torch._x"),
        (find_looks, "def f(p):\n    if look_alike(p):\n        tl.debug_barrier()"),
    ],
)
def test_harmless_code_passes(check, text):
    assert findings([Source("crossdock/good.py", text)], check) == ""
