"""The row operations as Triton kernels; importing a file of this package imports triton."""
