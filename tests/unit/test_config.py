"""Knobs and size hints."""

from __future__ import annotations

import pytest

from crossdock import Buffer, Config, ConfigError


def test_positions_are_those_of_the_clients() -> None:
    config = Config(24, 8, 128, 16, 512)
    assert (config.num_sms, config.num_max_nvl_chunked_recv_tokens) == (24, 128)
    assert config.num_max_rdma_chunked_recv_tokens == 512


@pytest.mark.parametrize(
    "knobs",
    [
        {"num_sms": 0},
        {"num_max_nvl_chunked_send_tokens": 256},
        {"num_max_rdma_chunked_send_tokens": 129},
    ],
)
def test_impossible_knobs(knobs: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=next(iter(knobs))):
        Config(**knobs)


def test_hints_grow_with_what_is_asked() -> None:
    config = Config()
    assert config.get_nvl_buffer_size_hint(8192, 8) > config.get_nvl_buffer_size_hint(4096, 8)
    assert config.get_nvl_buffer_size_hint(4096, 8) >= 8 * 256 * 4096
    assert config.get_rdma_buffer_size_hint(4096, 8) == 0
    assert config.get_rdma_buffer_size_hint(4096, 16) > 0


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 5, 8, 160])
def test_every_group_size_has_a_config(num_ranks: int) -> None:
    assert isinstance(Buffer.get_dispatch_config(num_ranks), Config)
    assert isinstance(Buffer.get_combine_config(num_ranks), Config)


def test_num_sms_is_class_wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Buffer, "num_sms", 20)
    Buffer.set_num_sms(24)
    assert Buffer.num_sms == 24
    assert Buffer.get_dispatch_config(4).num_sms == 24
    for wrong in (0, 7, -2):
        with pytest.raises(ConfigError):
            Buffer.set_num_sms(wrong)
