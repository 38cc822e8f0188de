"""Carriers: how bytes reach another peer, and where announcements are kept. Import from the modules."""
