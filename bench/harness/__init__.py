"""Shared by all measurements: cases, gates, timing, records."""
