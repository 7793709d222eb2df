"""The name of DeepEP's compiled module, which some clients import directly. Nothing is compiled."""

from crossdock import Config, EventHandle, topk_idx_t

__all__ = ["Config", "EventHandle", "topk_idx_t"]
