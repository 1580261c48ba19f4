"""Tidings client: fetch, rebuild, verify, switch."""
