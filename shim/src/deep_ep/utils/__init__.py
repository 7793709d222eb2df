"""Events under both of their import paths, and the helpers that DeepEP's test programs use.

The helpers stand alone: they need torch, not crossdock.
"""

from deep_ep.utils import envs, event, math, testing
from deep_ep.utils.event import EventHandle, EventOverlap

__all__ = ["EventHandle", "EventOverlap", "envs", "event", "math", "testing"]
