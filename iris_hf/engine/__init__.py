"""What every run stands on: devices, worker processes, loading, randomness and plugins."""
