"""Requests and answers over streams: drives the sans-I/O sessions of `moehive.protocol`. Import from the modules."""
