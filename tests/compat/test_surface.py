"""What `import deep_ep` offers: the names, their signatures, and what is not there.

Clients probe by import, `hasattr`, `inspect.signature` and unknown keywords, so presence and
absence are both part of the interface. `signatures.json` holds DeepEP's arguments in order, with
their defaults; an argument without one is required.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import crossdock
import deep_ep
import deep_ep_cpp

SIGNATURES = json.loads(Path(__file__).with_name("signatures.json").read_text(encoding="utf-8"))

NAMES = {
    "deep_ep": ["Buffer", "Config", "EventHandle", "EventOverlap", "__version__", "topk_idx_t"],
    "deep_ep.buffers.legacy": ["Buffer"],
    "deep_ep.utils": ["EventHandle", "EventOverlap"],
    "deep_ep.utils.event": ["EventHandle", "EventOverlap"],
    "deep_ep.utils.envs": ["init_dist"],
    "deep_ep.utils.math": [
        "align",
        "calc_diff",
        "hash_tensor",
        "inplace_unique",
        "per_token_cast_back",
        "per_token_cast_to_fp8",
    ],
    "deep_ep.utils.testing": ["bench", "bench_kineto"],
    "deep_ep_cpp": ["Config", "EventHandle", "topk_idx_t"],
}

ABSENT = {
    "deep_ep": [
        "ElasticBuffer",
        "EPHandle",
        "get_logical_domain_size",
        "get_physical_domain_size",
    ],
    "deep_ep.buffers": ["elastic"],
    "deep_ep.utils": ["check_nvlink_connections", "gate", "refs"],
}

ABSENT_METHODS = ["fused_deep_moe", "internode_combine", "internode_dispatch", "notify_verify"]
"""Of DeepEP-Ascend, and what DeepEP's own methods call."""

ADDITIONS = {
    "__init__": {
        "use_fabric": False,
        "transport": None,
        "max_tokens_per_rank": 0,
        "max_buffer_bytes": 0,
        "low_latency_format": "fp8",
        "low_latency_rows": "slab",
        "partials": "bf16",
        "timeout_s": None,
        "first_call_timeout_s": None,
    },
    "combine": {"combine_wait_recv_cost_stats": None},
    "dispatch": {"dispatch_wait_recv_cost_stats": None},
    "low_latency_dispatch": {"topk_weights": None},
}
"""Arguments of Buffer's methods that are crossdock's own, with their defaults."""

OPTIONAL_HERE = {("Buffer", "__init__", "group")}
"""Required by DeepEP; None here, for the default group or a world of one rank."""

PAIRS = [(name, method) for name, methods in SIGNATURES.items() for method in methods]


@pytest.mark.parametrize(("module", "names"), NAMES.items())
def test_names_are_there(module: str, names: list[str]) -> None:
    found = importlib.import_module(module)
    assert [name for name in names if not hasattr(found, name)] == []
    assert set(names) <= {*found.__all__}


@pytest.mark.parametrize(("module", "names"), ABSENT.items())
def test_what_crossdock_lacks_is_absent(module: str, names: list[str]) -> None:
    found = importlib.import_module(module)
    assert [name for name in names if hasattr(found, name)] == []
    assert importlib.util.find_spec("deep_ep.buffers.elastic") is None


@pytest.mark.parametrize("name", ABSENT_METHODS)
def test_methods_that_crossdock_lacks_are_absent(name: str) -> None:
    assert not hasattr(deep_ep.Buffer, name)


def test_names_are_crossdocks_own() -> None:
    assert deep_ep.Buffer is deep_ep.buffers.legacy.Buffer is crossdock.Buffer
    assert deep_ep.Config is deep_ep_cpp.Config is crossdock.Config
    assert deep_ep.utils.EventHandle is deep_ep_cpp.EventHandle is crossdock.EventHandle
    assert deep_ep.utils.EventOverlap is deep_ep.EventOverlap is crossdock.EventOverlap
    assert deep_ep.topk_idx_t is deep_ep_cpp.topk_idx_t is torch.int64
    assert deep_ep.__version__ == crossdock.__version__


@pytest.mark.parametrize("name", ["deep_ep", "deep_ep.utils", "deep_ep_cpp"])
def test_spec_can_be_found(name: str) -> None:
    spec = importlib.util.find_spec(name)
    assert spec is not None
    assert spec.origin is not None


def test_utils_come_with_the_package() -> None:
    """Clients write `import deep_ep` and then `deep_ep.utils.EventOverlap`."""
    code = "import deep_ep; deep_ep.utils.EventOverlap; deep_ep.buffers.legacy.Buffer"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.parametrize(("owner", "method"), PAIRS)
def test_signature_is_deep_eps(owner: str, method: str) -> None:
    theirs = SIGNATURES[owner][method]
    ours = _parameters(owner, method)
    positional = [each for each in ours if each.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]
    assert [each.name for each in positional] == [name for name, *_ in theirs]
    for parameter, (name, *default) in zip(positional, theirs, strict=True):
        if (owner, method, name) in OPTIONAL_HERE:
            assert parameter.default is None
        else:
            assert parameter.default == (default or [inspect.Parameter.empty])[0]


@pytest.mark.parametrize(("owner", "method"), PAIRS)
def test_additions_are_optional_keywords(owner: str, method: str) -> None:
    num_theirs = len(SIGNATURES[owner][method])
    for parameter in _parameters(owner, method)[num_theirs:]:
        assert parameter.kind is inspect.Parameter.KEYWORD_ONLY
        assert parameter.default is not inspect.Parameter.empty


@pytest.mark.parametrize("method", SIGNATURES["Buffer"])
def test_additions_are_the_known_ones(method: str) -> None:
    """Whoever adds an argument says so here."""
    added = _parameters("Buffer", method)[len(SIGNATURES["Buffer"][method]) :]
    assert {each.name: each.default for each in added} == ADDITIONS.get(method, {})


def test_every_method_of_a_call_is_in_the_table() -> None:
    """A public method of Buffer is DeepEP's, and in the table, or a known addition."""
    of_views = {"dispatch_views", "low_latency_dispatch_views", "low_latency_combine_views"}
    additions = {"check", "warmup", "get_next_low_latency_views_buffer", *of_views}
    public = {name for name, _ in inspect.getmembers(deep_ep.Buffer, inspect.isroutine)}
    named = {name for name in public if not name.startswith("_")}
    assert named - additions == {*SIGNATURES["Buffer"]} - {"__init__"}


@pytest.mark.parametrize(("owner", "method"), PAIRS)
def test_unknown_keywords_are_type_errors(owner: str, method: str) -> None:
    theirs = [name for name, *default in SIGNATURES[owner][method] if not default]
    known: dict[str, Any] = dict.fromkeys(theirs)
    target = _target(owner, method)
    with pytest.raises(TypeError, match="no_such_argument"):
        target(**known, no_such_argument=1)


def test_attributes_that_clients_read() -> None:
    with deep_ep.Buffer(None, 1 << 16, explicitly_destroy=True) as buffer:
        assert (buffer.rank, buffer.group_size, buffer.group) == (0, 1, None)
        assert (buffer.num_nvl_bytes, buffer.num_rdma_bytes) == (1 << 16, 0)
        assert (buffer.explicitly_destroy, buffer.low_latency_mode) == (True, False)
        assert buffer.enable_shrink is False


def test_static_methods_need_no_instance() -> None:
    assert deep_ep.Buffer.is_sm90_compiled() in (True, False)
    assert isinstance(deep_ep.Buffer.capture(), deep_ep.EventOverlap)
    assert isinstance(deep_ep.Buffer.get_dispatch_config(8), deep_ep.Config)
    assert isinstance(deep_ep.Buffer.get_combine_config(8), deep_ep.Config)


def test_low_latency_size_hint_goes_by_position_and_by_name() -> None:
    by_position = deep_ep.Buffer.get_low_latency_rdma_size_hint(128, 7168, 8, 256)
    by_name = deep_ep.Buffer.get_low_latency_rdma_size_hint(
        num_max_dispatch_tokens_per_rank=128, hidden=7168, num_ranks=8, num_experts=256
    )
    assert by_position == by_name > 8 * 128 * 7168


def test_number_of_sms_is_of_the_class(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deep_ep.Buffer, "num_sms", 20)
    deep_ep.Buffer.set_num_sms(24)
    assert deep_ep.Buffer.num_sms == 24
    with deep_ep.Buffer() as buffer:
        buffer.set_num_sms(22)
    assert deep_ep.Buffer.num_sms == 22


def test_config_goes_by_position_and_by_name() -> None:
    assert deep_ep.Config(24, 8, 256) == deep_ep.Config(
        num_sms=24, num_max_nvl_chunked_send_tokens=8, num_max_nvl_chunked_recv_tokens=256
    )
    assert deep_ep.Config().get_nvl_buffer_size_hint(4096, 8) > 0
    assert deep_ep.Config().get_rdma_buffer_size_hint(4096, 8) == 0


def _target(owner: str, method: str) -> Callable[..., Any]:
    """The class itself for its constructor, else the method of an instance."""
    target = getattr(deep_ep, owner)
    return target if method == "__init__" else getattr(target(), method)


def _parameters(owner: str, method: str) -> list[inspect.Parameter]:
    return list(inspect.signature(_target(owner, method)).parameters.values())
