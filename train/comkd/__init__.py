"""ComKD-CLIP (arXiv 2408.04145): a teacher is adapted to a domain, and a student learns its classes from a store."""
