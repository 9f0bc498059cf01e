"""Makes the small model that ships with the library: its text, its tokens, its weights, its trace."""
