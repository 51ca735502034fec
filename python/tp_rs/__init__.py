"""Tensor parallelism in one process, over devices that need not match.

It reads a checkpoint's headers, divides the model over the memory of the devices and says
what every rank holds, byte by byte, before anything is loaded.

    >>> import tp_rs
    >>> plan = tp_rs.plan("path/to/model", gpu_split=[24, 12, 8], context=32768)  # doctest: +SKIP
    >>> print(plan)  # doctest: +SKIP
"""

import logging
from typing import Final

from tp_rs._native import (
    Communicator,
    ModelShape,
    Part,
    Plan,
    PlannedModel,
    RankPlan,
    RankView,
    Shortfall,
    StepTime,
    Tensor,
    Unsplittable,
)
from tp_rs._native import __version__ as __version__
from tp_rs.context import TPContext
from tp_rs.errors import CollectiveTimeout, CudaError, DoesNotFit, InvalidInput, ModelError, TPError
from tp_rs.load import load
from tp_rs.plan import integer_split, plan

BROADCAST_KV: Final = 0
"""KV heads."""
BROADCAST_ID: Final = 1
"""Intermediate columns."""
BROADCAST_VC: Final = 2
"""Vocabulary rows."""
BROADCAST_RS: Final = 3
"""Columns of the residual stream."""
BROADCAST_Q: Final = 4
"""Query heads."""

__all__ = [
    "load",
    "plan",
    "integer_split",
    "Plan",
    "PlannedModel",
    "RankPlan",
    "Shortfall",
    "StepTime",
    "TPContext",
    "Communicator",
    "RankView",
    "ModelShape",
    "Tensor",
    "Part",
    "Unsplittable",
    "TPError",
    "InvalidInput",
    "DoesNotFit",
    "ModelError",
    "CudaError",
    "CollectiveTimeout",
    "BROADCAST_KV",
    "BROADCAST_ID",
    "BROADCAST_VC",
    "BROADCAST_RS",
    "BROADCAST_Q",
    "__version__",
]

# A library stays silent until the application says where its logs go.
logging.getLogger("tp_rs").addHandler(logging.NullHandler())
