"""The disk tier: content-addressed objects, verified on the way in and on the way out.

Import from the modules; nothing happens on import.
"""
