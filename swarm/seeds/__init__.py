"""Permanent seeds: what can stand in for peers that are missing, because the model was made from it.

A converted directory, the original Hugging Face checkpoint in a directory, or that checkpoint on the hub. A seed costs
nothing but time: its bytes are verified against the manifest like any peer's. Import from the modules.
"""
