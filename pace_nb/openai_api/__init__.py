"""OpenAI's wire format, without a wire: JSON bodies in and out, from lines of a file too."""
