"""Measurements of der_fast: `python -m bench list | run | compare | readme | plot`; bench/README.md says how to read them."""
