"""Steps that codecs share: what they are given, what is worth its bits, and how symbols become bytes."""
