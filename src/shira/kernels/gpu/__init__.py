"""The kernels in Triton, for tensors on a GPU."""
