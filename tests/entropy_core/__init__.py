"""Tests of `entropy_core`, one file a module."""
