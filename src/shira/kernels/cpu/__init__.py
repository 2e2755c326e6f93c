"""The kernels in C, for tensors on the CPU."""
