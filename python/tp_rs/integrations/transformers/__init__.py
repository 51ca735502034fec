"""transformers' causal language models over unequal ranks in one process, none of them patched."""

from tp_rs.integrations.transformers.load import load
from tp_rs.integrations.transformers.splits import Splits, SplitSource

__all__ = ["SplitSource", "Splits", "load"]
