"""The GPU kernels on a GPU: are they right, and how near the roofline. Started by scripts/bench/gpu.sh.

Needs torch, triton and a checkout; nothing of the project has to be installed.
"""
