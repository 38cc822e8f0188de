"""Experts on the processor, with torch's own kernels."""
