"""Networks and frozen codecs; this layer imports no other layer of the package."""
