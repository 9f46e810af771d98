"""Constructs: each owns one kind of resource and what is always true of it."""
