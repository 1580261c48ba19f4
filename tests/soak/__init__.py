"""The soak: everything at once on one tree, with kills and damage, and the truth kept beside it."""
