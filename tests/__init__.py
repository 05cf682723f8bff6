"""Tests of the project: the oracle, and one folder a package."""
