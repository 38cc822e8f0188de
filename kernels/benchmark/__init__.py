"""How fast the experts of one layer are on this machine, against what the machine can do."""
