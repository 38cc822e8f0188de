"""Routing traces: which experts every token used. Recorded, replayed, learned from. Import from the modules."""
