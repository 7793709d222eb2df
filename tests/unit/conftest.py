"""Which tests need Triton to be imported at all."""

from __future__ import annotations

from importlib.util import find_spec

collect_ignore_glob = [] if find_spec("triton") else ["test_device_*.py"]
