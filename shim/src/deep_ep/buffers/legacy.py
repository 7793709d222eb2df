"""Where DeepEP keeps its first interface; the name says nothing about this implementation."""

from crossdock import Buffer

__all__ = ["Buffer"]
