"""Models and data sets as repositories of the Hugging Face Hub."""
