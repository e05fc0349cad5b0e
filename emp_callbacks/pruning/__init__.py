"""The life of a mask: found, scored, decided, applied, accounted for."""
