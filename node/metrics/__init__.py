"""What a process says of itself to Prometheus: made, whenever it is asked, of the facts that everything else shows."""
