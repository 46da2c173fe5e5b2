"""Compiled ops and their autograd functions, one file per op."""
