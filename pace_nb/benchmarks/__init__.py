"""What `pace-nb bench` measures: engines by vLLM's definitions, kernels by the machine's limits."""
