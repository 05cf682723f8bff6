"""Where texts that a policy wrote are scored: child processes without network, files, environment or a way out."""
