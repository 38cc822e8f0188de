"""The daemon that serves experts, and the command line."""
