"""Pure decisions about what runs where and together with what."""
