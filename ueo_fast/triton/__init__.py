"""Triton kernels for GPUs: a machine without our CUDA library, or ROCm."""
