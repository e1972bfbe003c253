"""Figures; the only package that imports matplotlib, and plotly in ``interactive`` alone."""
