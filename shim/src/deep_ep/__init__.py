"""DeepEP's package name, answered by crossdock.

For programs that say `import deep_ep`. Nothing is implemented here: a name is either crossdock's
own or absent, because clients probe with `hasattr`. The helpers that test programs import are in
`deep_ep.utils`.
"""

from crossdock import Buffer, Config, EventHandle, EventOverlap, __version__, topk_idx_t
from deep_ep import buffers, utils

__all__ = [
    "Buffer",
    "Config",
    "EventHandle",
    "EventOverlap",
    "__version__",
    "buffers",
    "topk_idx_t",
    "utils",
]
