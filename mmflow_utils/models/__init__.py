"""Models: the adapter to their parts, and how they get here from a folder or the hub."""

from mmflow_utils.models.adapter import VLM, compute_device, picture_features, text_inputs
from mmflow_utils.models.load import find_checkpoint, load_model

__all__ = ["VLM", "compute_device", "find_checkpoint", "load_model", "picture_features", "text_inputs"]
