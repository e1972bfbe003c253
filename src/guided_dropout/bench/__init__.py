"""Experiments made of many runs: paired statistics and reports."""
