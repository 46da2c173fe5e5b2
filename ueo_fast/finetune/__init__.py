"""The recipe around the loss: prompt, affine parameters, category shifts, metrics, training.

Import the modules themselves, e.g. ``from ueo_fast.finetune.prompt import PromptLearner``; nothing
is imported here, so that ``import ueo_fast`` needs neither open_clip nor torchmetrics.
"""
