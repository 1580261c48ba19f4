"""Tidings' chunk store: chunking, recipes, deltas, packs and heads. No network, no command line."""
