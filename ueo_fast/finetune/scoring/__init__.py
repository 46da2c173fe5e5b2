"""A table of images with classes, scores, and known or unknown."""
