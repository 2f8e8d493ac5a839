"""Fixtures and hooks of every test."""

pytest_plugins = ("harness",)
