"""What grouped decode and sparse prefill share: the parts of kernels and references, checks."""
