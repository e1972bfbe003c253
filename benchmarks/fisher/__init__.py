"""Speed, memory and accuracy of the batched Fisher beside floors and peers: ``python -m benchmarks.fisher``."""
