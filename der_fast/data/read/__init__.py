"""A pass over image files, batch by batch: with DALI, with Pillow, or from the resident cache."""
