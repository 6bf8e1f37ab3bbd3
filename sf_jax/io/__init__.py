"""Videos and images: reading what users have, writing what players take."""
