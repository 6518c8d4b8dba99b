"""A study as one report: a page, a Markdown file, and its plots."""
