"""`nano`: a Wan in miniature that ships with wantrt, and everything that made it."""
