"""Bytes of objects between peers: carriers, the download engine, and serving. Import from the modules."""
