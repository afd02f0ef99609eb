"""One rank of a benchmark: prints what it got."""

import json
import sys

from tiny import NormNet, Tensors

from iris_hf.inference.benchmark import benchmark_model

if __name__ == "__main__":
    result = benchmark_model(NormNet(), Tensors(16), batch_size=4, device="cpu", num_iterations=3)
    sys.stdout.write(f"RESULT {json.dumps(result._asdict())}\n")  # at once: the other rank writes to the same pipe
    sys.stdout.flush()
