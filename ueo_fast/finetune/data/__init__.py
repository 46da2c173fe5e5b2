"""Images and labels from the disk: folders, lists and the paper's data sets.

Import the modules themselves, e.g. ``from ueo_fast.finetune.data.image_list import read_images``.
"""
