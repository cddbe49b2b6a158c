"""The plain slow way to run a variant, and the checks that hold a model's adapter and masks to account."""

from mmflow_utils.reference.checks import attention_pattern, check_model, rounding
from mmflow_utils.reference.engine import Run, run_reference

__all__ = ["Run", "attention_pattern", "check_model", "rounding", "run_reference"]
