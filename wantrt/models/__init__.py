"""Reference modules in torch: the definition of correct, which every path is checked against."""
