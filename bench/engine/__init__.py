"""The engine measured whole: latency and throughput against the roofline of the machine."""
