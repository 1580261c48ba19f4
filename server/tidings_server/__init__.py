"""Tidings mirror: publish and serve."""
