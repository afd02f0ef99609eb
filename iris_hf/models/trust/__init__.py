"""What is refused of a model that comes from elsewhere."""
