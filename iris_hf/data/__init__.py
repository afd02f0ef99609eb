"""Data sets, targets, images, collation and transforms."""
