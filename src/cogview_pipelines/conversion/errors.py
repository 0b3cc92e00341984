"""What a converter raises."""


class ConversionError(ValueError):
    """A file that cannot be converted; the message says which, why, and what to do."""
