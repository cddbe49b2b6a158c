"""Long computations in parts, which a killed run, or another machine, goes on with."""

from mmflow_utils.parts.compute import compute_in_parts

__all__ = ["compute_in_parts"]
