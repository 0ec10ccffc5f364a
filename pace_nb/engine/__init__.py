"""The engine: requests in, tokens out. It schedules, runs, samples and updates; it knows no text."""
