"""Measurements on pytest-benchmark; `make bench` runs them and writes benchmarks/results/*.csv."""
