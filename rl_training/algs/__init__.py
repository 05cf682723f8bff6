"""Algorithms: Dr. GRPO with its training buffer, and the entropy probe."""
