"""Other engines, installed and timed beside pace_nb (docs/how-to/compare-with-peers.md)."""
