"""Transformer building blocks: small, composable, documented with shapes."""
