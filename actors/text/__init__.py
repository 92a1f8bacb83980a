"""Converts conversations to tokens and back: templates, tokenizers, ends of replies."""
