"""A pass over image files, batch by batch: by DALI, by Pillow, or from the resident cache."""
