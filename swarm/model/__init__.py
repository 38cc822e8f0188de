"""A converted model on this machine: its files, its tensors, and the transformers plug-in. Import from the modules."""
