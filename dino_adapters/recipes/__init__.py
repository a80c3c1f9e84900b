"""Typed settings, checked before anything runs."""
