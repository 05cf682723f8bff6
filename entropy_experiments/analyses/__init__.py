"""One question a file; each a pure function of labelled arrays."""
