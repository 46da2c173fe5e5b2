"""Settings of the memory allocator that the runs are made with."""

TUNED_ALLOCATOR = {
    "MALLOC_MMAP_MAX_": "0",  # no fresh mapping, hence no page faults, for every large tensor
    "MALLOC_TRIM_THRESHOLD_": "100000000000",  # freed memory stays with the process
    "MALLOC_TOP_PAD_": "1000000000",
}
"""glibc's malloc keeps its memory, as a caching allocator does: page faults do not decide."""

MAPPED_ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536"}
"""Every large tensor is a mapping of its own: a process's peak is then what its tensors hold, not
the holes of a heap as well."""
