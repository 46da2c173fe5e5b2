"""A demonstration on real data that needs no download: a tiny CLIP on handwritten digits."""
