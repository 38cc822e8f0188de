"""One MoE layer over the swarm: who computes which rows, asking them, coping with failures. Import the modules."""
