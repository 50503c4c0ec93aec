"""Measurements with a command of their own: `python -m bench <study>`."""
