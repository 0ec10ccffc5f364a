"""Measurements: each kernel and the engine against the limits of the machine they run on."""
