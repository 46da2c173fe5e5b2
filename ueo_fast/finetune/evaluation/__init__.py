"""Predictions, metrics, and tables of them."""
