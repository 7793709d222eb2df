"""Events, as `deep_ep.utils.event` names them."""

from crossdock import EventHandle, EventOverlap

__all__ = ["EventHandle", "EventOverlap"]
