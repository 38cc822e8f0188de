"""What is stored and what is said: manifest, hashes, messages, limits and errors. No sockets, no torch."""
