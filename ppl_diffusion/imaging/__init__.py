"""Images as token sequences: codecs, measurement operators, metrics and files."""
