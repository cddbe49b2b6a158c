"""Samples: one question about one picture, and the readers that make them (paper §4, App. A)."""

from mmflow_utils.samples.authors import compare_with_authors, read_authors, read_authors_csv
from mmflow_utils.samples.captions import add_captions, captions_file
from mmflow_utils.samples.gqa import read_gqa
from mmflow_utils.samples.records import (
    TASKS,
    Box,
    Sample,
    SceneObject,
    frame_to_samples,
    is_correct,
    load_image,
    samples_to_frame,
)
from mmflow_utils.samples.vqa import read_aokvqa, read_okvqa, vqa_accuracy

__all__ = [
    "Box",
    "Sample",
    "SceneObject",
    "TASKS",
    "add_captions",
    "captions_file",
    "compare_with_authors",
    "frame_to_samples",
    "is_correct",
    "load_image",
    "read_aokvqa",
    "read_authors",
    "read_authors_csv",
    "read_gqa",
    "read_okvqa",
    "samples_to_frame",
    "vqa_accuracy",
]
