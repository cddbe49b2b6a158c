"""Figures from tidy frames: curves over layers, stages, accuracy, pictures, prompts.

Every function takes data, returns one Figure (or HTML), with `title` and `subtitle` above it, and leaves matplotlib as
it was. A flow has one color in all figures; the colors stay apart under the common kinds of color blindness. Never
imports torch.
"""
