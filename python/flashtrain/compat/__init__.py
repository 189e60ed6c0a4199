"""Names of other packages for what flashtrain has; nothing else of flashtrain depends on it."""
