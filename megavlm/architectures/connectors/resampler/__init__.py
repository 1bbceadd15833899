"""Learned queries that look at the patches."""
