"""Bandwidth measurement."""
