"""The buffers of DeepEP that crossdock has: one module each."""

from deep_ep.buffers import legacy

__all__ = ["legacy"]
