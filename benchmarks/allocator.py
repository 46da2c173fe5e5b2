"""Settings of the memory allocator; imports nothing, so a process can load any build."""

TUNED = {
    "MALLOC_MMAP_MAX_": "0",  # no new mapping for each large tensor, which causes page faults
    "MALLOC_TRIM_THRESHOLD_": "100000000000",  # freed memory stays with the process
    "MALLOC_TOP_PAD_": "1000000000",
}
"""glibc's malloc keeps its memory, as a caching allocator does, so page faults do not dominate."""

MAPPED = {"MALLOC_MMAP_THRESHOLD_": "65536"}
"""Every large tensor is a mapping of its own, so a process's peak is what its tensors take, without
the holes in a heap."""
