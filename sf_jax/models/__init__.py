"""Networks and frozen codecs; this layer imports nothing else of the package."""
