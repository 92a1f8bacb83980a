"""From conversations to tokens and back: templates, tokenizers, where replies end."""
