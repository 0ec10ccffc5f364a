"""OpenAI's wire format, without a wire: JSON bodies in, JSON bodies out. No HTTP, no engine."""
