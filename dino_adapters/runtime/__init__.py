"""Names, messages, chance, files and devices."""
