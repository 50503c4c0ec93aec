"""Which images there are: folders, lists, tars, and the index that remembers them."""
