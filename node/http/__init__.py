"""What a node or a client says over HTTP: the server itself, and the applications it hosts."""
