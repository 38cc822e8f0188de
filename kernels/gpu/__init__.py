"""The Triton kernels and what launches them. Importing a module of this folder imports triton."""
