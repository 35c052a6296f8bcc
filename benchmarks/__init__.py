"""Measurements, each of which `coatnet bench NAME` runs again; what they printed is in results/."""
