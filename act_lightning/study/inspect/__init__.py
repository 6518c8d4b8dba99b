"""Looks at a store of demonstrations: what it holds, and what is wrong or odd about it."""
