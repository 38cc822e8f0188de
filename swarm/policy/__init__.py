"""Decisions without I/O: functions from facts on frozen dataclasses to what should be done. Import from the modules."""
