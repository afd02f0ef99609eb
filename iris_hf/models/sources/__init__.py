"""Models of other libraries, in the model interface of iris_hf."""
