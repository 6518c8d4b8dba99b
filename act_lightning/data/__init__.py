"""Demonstration stores, and the stream of batches read from them."""
