"""The engine: requests in, tokens out. It schedules, runs, samples, updates; it knows no text."""
