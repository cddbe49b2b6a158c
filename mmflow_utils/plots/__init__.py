"""Figures from tidy frames: curves over layers, stages, accuracy, pictures, prompts.

Every function takes data, returns one Figure (or HTML) and leaves matplotlib as it was. A flow has one color
in all figures; the colors stay apart under the common kinds of color blindness. Never imports torch.
"""
