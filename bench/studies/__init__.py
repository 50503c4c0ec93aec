"""Measurements with their own commands: `python -m bench <study>`."""
