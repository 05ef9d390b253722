"""Fast paths that compute what the plain model computes; this package imports nothing of the rest."""
