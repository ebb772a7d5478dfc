"""Intervals and tests. Copies of a row are one observation: every function takes clusters of rows."""
